"""The example's corpus: which files are held out, and which windows a seed draws."""

import numpy as np
import pytest

from examples.corpus import BLOCK, END_OF_FILE, is_held_out, load_corpus, unigram_entropy


def folder_of(path, names):
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(f"<{name}>".encode() * 20)
    return path


NAMES = [f"package{i % 7}/module{i}.py" for i in range(200)]


def held_out_names(corpus):
    return {name for name in NAMES if f"<{name}>".encode() in corpus.validation.tobytes()}


def test_every_file_is_whole_in_one_half_alone(tmp_path):
    corpus = load_corpus(folder_of(tmp_path, NAMES))
    train, validation = corpus.train.tobytes(), corpus.validation.tobytes()
    for name in NAMES:
        whole = f"<{name}>".encode() * 20 + END_OF_FILE
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
    np.testing.assert_array_equal(plain.train, hidden.train)
    np.testing.assert_array_equal(plain.validation, hidden.validation)


def test_a_single_file_is_split_in_blocks(tmp_path):
    content = np.random.default_rng(0).integers(1, 256, 40 * BLOCK, dtype=np.uint8)
    file = tmp_path / "corpus.bin"
    file.write_bytes(content.tobytes())
    corpus = load_corpus(file)
    lengths = len(corpus.train), len(corpus.validation)
    assert sum(lengths) == len(content) + 40
    assert min(lengths) >= BLOCK


def test_nothing_to_hold_out_is_an_error_that_says_so(tmp_path):
    (tmp_path / "only.py").write_text("pass")
    with pytest.raises(ValueError, match="hold out"):
        load_corpus(tmp_path)


def test_the_default_is_the_standard_library_without_installed_packages():
    corpus = load_corpus()
    both = corpus.train.tobytes() + corpus.validation.tobytes()
    assert b"def getsourcefile(object):" in both  # inspect.py
    assert b"def clip_by_global_norm(" not in both  # optax, in site-packages
    assert len(corpus.validation) > 100_000
    assert 2.0 < unigram_entropy(corpus.validation) < 4.0


def test_a_seed_draws_the_same_batches_again_and_another_seed_others(tmp_path):
    corpus = load_corpus(folder_of(tmp_path, NAMES))

    def batches(seed):
        return np.stack(list(corpus.train_batches(seed=seed, steps=5, batch=4, context=16)))

    assert batches(0).shape == (5, 4, 17)
    np.testing.assert_array_equal(batches(0), batches(0))
    assert (batches(0) != batches(1)).any()


def test_windows_are_runs_of_the_stream(tmp_path):
    corpus = load_corpus(folder_of(tmp_path, NAMES))
    windows = corpus.validation_windows(count=5, context=16)
    stream = corpus.validation.tobytes()
    assert windows.shape == (5, 17)
    assert windows.dtype == np.uint8
    assert all(window.tobytes() in stream for window in windows)
    assert stream.startswith(windows[0].tobytes())
    assert stream.endswith(windows[-1].tobytes())
