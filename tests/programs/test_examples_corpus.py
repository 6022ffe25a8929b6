"""The example's corpus: which files are held out, and which windows a seed draws."""

import numpy as np
import pytest

from examples.corpus import BLOCK, is_held_out, load_corpus, unigram_entropy
from examples.errors import BadInput
from examples.shards import HEADER, write_shard
from examples.stream import Stream
from examples.tokens import TokenizerFile, load_tokens

END = b"\0"


def folder_of(path, names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(f"<{name}>".encode() * 20)
    return path


def bytes_of(stream):
    return b"".join(part.tobytes() for part in stream.parts)


NAMES = [f"package{i % 7}/module{i}.py" for i in range(200)]


def held_out_names(corpus):
    return {name for name in NAMES if f"<{name}>".encode() in bytes_of(corpus.validation)}


def test_every_file_is_whole_in_one_half_alone(tmp_path):
    corpus = load_corpus(folder_of(tmp_path, NAMES))
    train, validation = bytes_of(corpus.train), bytes_of(corpus.validation)
    for name in NAMES:
        whole = f"<{name}>".encode() * 20 + END
        assert (whole in train) != (whole in validation)
    assert 0 < len(held_out_names(corpus)) < len(NAMES) / 4


def test_other_files_do_not_move_a_file_to_the_other_half(tmp_path):
    few = load_corpus(folder_of(tmp_path / "few", NAMES[:100]))
    all_of_them = load_corpus(folder_of(tmp_path / "all", NAMES))
    assert held_out_names(few) == held_out_names(all_of_them) & set(NAMES[:100])


def test_the_held_out_names_are_the_same_everywhere():
    names = ("abc.py", "asyncio/tasks.py", "bz2.py", "calendar.py", "json/decoder.py", "os.py")
    assert [name for name in names if is_held_out(name)] == ["bz2.py", "calendar.py"]


def test_hidden_files_and_compiled_modules_are_left_out(tmp_path):
    folder_of(tmp_path, NAMES)
    plain = load_corpus(tmp_path)
    folder_of(tmp_path, [".git/config", "package0/.secret", "package0/__pycache__/m.pyc"])
    hidden = load_corpus(tmp_path)
    assert bytes_of(plain.train) == bytes_of(hidden.train)
    assert bytes_of(plain.validation) == bytes_of(hidden.validation)


def test_a_single_file_is_split_in_blocks(tmp_path):
    content = np.random.default_rng(0).integers(1, 256, 40 * BLOCK, dtype=np.uint8)
    file = tmp_path / "corpus.txt"
    file.write_bytes(content.tobytes())
    corpus = load_corpus(file)
    lengths = len(corpus.train), len(corpus.validation)
    assert sum(lengths) == len(content) + 40
    assert min(lengths) >= BLOCK


def test_nothing_to_hold_out_is_an_error_that_says_so(tmp_path):
    (tmp_path / "only.py").write_text("pass")
    with pytest.raises(BadInput, match="hold out"):
        load_corpus(tmp_path)


def test_the_default_is_the_standard_library_without_installed_packages():
    corpus = load_corpus()
    both = bytes_of(corpus.train) + bytes_of(corpus.validation)
    assert b"def getsourcefile(object):" in both  # inspect.py
    assert b"def clip_by_global_norm(" not in both  # optax, in site-packages
    assert len(corpus.validation) > 100_000
    assert 2.0 < unigram_entropy(corpus.validation) < 4.0


def test_a_batch_follows_from_seed_and_step_alone(tmp_path):
    corpus = load_corpus(folder_of(tmp_path, NAMES))

    def batch(step, seed=0):
        return corpus.batch(step, seed=seed, batch=4, context=16)

    assert batch(3).shape == (4, 17)
    np.testing.assert_array_equal(batch(3), batch(3))
    assert (batch(3) != batch(2)).any()
    assert (batch(3) != batch(3, seed=1)).any()


def test_windows_are_runs_of_the_stream(tmp_path):
    corpus = load_corpus(folder_of(tmp_path, NAMES))
    windows = corpus.validation_windows(count=5, context=16)
    stream = bytes_of(corpus.validation)
    assert windows.shape == (5, 17)
    assert windows.dtype == np.uint8
    assert all(window.tobytes() in stream for window in windows)
    assert stream.startswith(windows[0].tobytes())
    assert stream.endswith(windows[-1].tobytes())


def test_no_window_crosses_from_one_part_to_the_next_and_every_place_is_drawn():
    stream = Stream([np.arange(10), np.arange(3), np.arange(100, 106)])
    windows = stream.random_windows(np.random.default_rng(0), 300, 5)
    assert (np.diff(windows) == 1).all()
    assert set(windows[:, 0]) == {0, 1, 2, 3, 4, 5, 100, 101}
    assert stream.spread_windows(2, 5)[:, 0].tolist() == [0, 101]
    with pytest.raises(BadInput, match="a shorter context"):
        stream.spread_windows(2, 11)


def test_parquet_has_a_document_a_row(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [f"<{i}>" * 20 for i in range(100)]
    parquet.write_table(arrow.table({"text": texts, "id": range(100)}), tmp_path / "a.parquet")
    corpus = load_corpus(tmp_path)
    both = bytes_of(corpus.train) + bytes_of(corpus.validation)
    assert all(text.encode() + END in both for text in texts)
    parquet.write_table(arrow.table({"id": range(100)}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="a.parquet: found the columns id, expected `text`"):
        load_corpus(tmp_path)
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(BadInput, match="a.parquet: no Parquet file"):
        load_corpus(tmp_path)


@pytest.fixture
def shards(tmp_path):
    write_shard(tmp_path / "fineweb_val_0.bin", np.arange(100))
    write_shard(tmp_path / "fineweb_train_0.bin", np.arange(1000, 2000))
    write_shard(tmp_path / "fineweb_train_1.bin", np.arange(2000, 2500))
    return tmp_path


def test_shards_are_read_behind_their_header_and_those_named_val_are_held_out(shards):
    corpus = load_corpus(shards, vocabulary=50257)
    assert [part.tolist() for part in corpus.validation.parts] == [list(range(100))]
    assert np.concatenate(corpus.train.parts).tolist() == list(range(1000, 2500))


def test_without_a_shard_to_validate_on_the_last_tenth_is_held_out(shards):
    corpus = load_corpus(shards / "fineweb_train_0.bin", vocabulary=50257)
    assert (len(corpus.train), len(corpus.validation)) == (900, 100)
    assert corpus.validation.parts[0][0] == 1900


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: content[:-2], "found 499 ids, expected the 500"),
        (lambda content: content[: HEADER // 2], "found 512 bytes, expected a header of 1024"),
        (lambda content: content[:4] + b"\2" + content[5:], "found version 2"),
        (
            lambda content: b"\0" * 4 + content[4:],
            "found 0 at the beginning, expected a shard's 202",
        ),
    ],
)
def test_a_malformed_shard_is_named_with_what_was_found(shards, spoil, said):
    file = shards / "fineweb_train_1.bin"
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(BadInput, match=f"fineweb_train_1.bin: {said}"):
        load_corpus(shards, vocabulary=50257)


def test_an_id_that_the_model_does_not_know_is_named(shards):
    with pytest.raises(BadInput, match="found the id 1999, expected less than 256: set --vocab"):
        load_corpus(shards)


def test_a_tokenizer_file_is_used_and_ends_every_document(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2, "?": 3}, "?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = load_tokens(tmp_path / "tokenizer.json")
    assert isinstance(tokens, TokenizerFile)
    assert (tokens.vocabulary, tokens.end, tokens.encode("b a")) == (4, 0, [2, 1])
    text = tmp_path / "text"
    for i in range(100):
        (text / str(i)).mkdir(parents=True)
        (text / str(i) / "x.txt").write_text("a b")
    corpus = load_corpus(text, tokens)
    assert corpus.train.parts[0][:6].tolist() == [1, 2, 0, 1, 2, 0]
    with pytest.raises(BadInput, match="no tokenizer to read"):
        load_tokens(text / "0" / "x.txt")


def test_a_missing_corpus_is_named(tmp_path):
    with pytest.raises(BadInput, match="nowhere: there is no such file"):
        load_corpus(tmp_path / "nowhere")
