"""Data to fine-tune on: which tokens count, what does not fit, and how a bad row is named."""

import json

import numpy as np
import pytest

from examples.conversations import CUT_ANSWER, LONG_PROMPT, prompt_ids, read_conversations
from examples.errors import BadInput
from examples.packing import pack
from examples.preferences import EQUAL, read_pairs
from examples.rows import batches, split, whole_batches
from examples.tokens import Bytes

TOKENS = Bytes()
USER, ASSISTANT = b"\2", b"\3"


def file_of(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


def minimind(*turns):
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    return {"conversations": messages}


def text_of(conversation):
    return bytes(conversation.ids.tolist())


def answers_of(conversation):
    return bytes(conversation.ids[conversation.weights == 1].tolist())


def test_the_loss_is_on_the_answers_and_their_ends_alone(tmp_path):
    path = file_of(
        tmp_path,
        minimind("Hi", "Hello", "Bye", "So long"),
        {"question": "1 + 1?", "answer": "2\n#### 2"},
    )
    (talk, sum_), omissions = read_conversations(path, TOKENS, context=64)
    expected = USER + b"Hi\0" + ASSISTANT + b"Hello\0" + USER + b"Bye\0" + ASSISTANT + b"So long\0"
    assert text_of(talk) == expected
    assert answers_of(talk) == b"Hello\0So long\0"
    assert bytes(talk.prompt) == USER + b"Hi\0" + ASSISTANT
    assert answers_of(sum_) == b"2\n#### 2\0"
    assert prompt_ids([("user", "Hi")], TOKENS) == talk.prompt
    assert not omissions


def test_long_prompts_and_cut_answers_are_counted(tmp_path):
    path = file_of(
        tmp_path,
        minimind("x" * 50, "never seen"),
        minimind("short", "y" * 50),
        minimind("short", "fits"),
    )
    found, omissions = read_conversations(path, TOKENS, context=30)
    assert [len(each.ids) for each in found] == [31, 13]
    assert answers_of(found[0]) == b"y" * 23
    assert omissions == {LONG_PROMPT: 1, CUT_ANSWER: 1}
    assert omissions.lines()[0].startswith("1 left out: the prompt alone fills the context")


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{oops\n", r"line 2: found \{oops .*, expected a JSON object"),
        ("[1]\n", r"line 2: found \[1\], expected a JSON object"),
        ({"text": "a"}, "line 2: found text, expected `conversations`, or `question` and `answer`"),
        ({"conversations": []}, r"line 2: found conversations: \[\], expected a list of messages"),
        ({"conversations": ["hi"]}, 'line 2: found conversations: "hi", expected {"role"'),
        (
            minimind("hi"),
            "line 2: found conversations: a last turn of user, expected one of assistant",
        ),
        (
            {"conversations": [{"role": "robot", "content": "hi"}]},
            'the role "robot", expected one of system, user, assistant',
        ),
        ({"question": "a", "answer": 3}, "line 2: found answer: 3, expected text"),
        ({"question": " ", "answer": "b"}, 'line 2: found question: " ", expected text'),
    ],
)
def test_a_bad_row_is_named_with_what_was_found_and_expected(tmp_path, row, said):
    path = file_of(tmp_path, minimind("a", "b"), row, minimind("a", "b"))
    with pytest.raises(BadInput, match=f"rows.jsonl, {said}" if said.startswith("line") else said):
        read_conversations(path, TOKENS, context=64)


@pytest.mark.parametrize("read", [read_conversations, read_pairs])
def test_a_missing_and_an_empty_file_are_named(tmp_path, read):
    with pytest.raises(BadInput, match=r"rows.jsonl: there is no such file"):
        read(tmp_path / "rows.jsonl", TOKENS, context=64)
    with pytest.raises(BadInput, match=r"rows.jsonl: found no rows"):
        read(file_of(tmp_path, "\n", "  \n"), TOKENS, context=64)


def test_pairs_are_read_in_both_forms_and_equal_ones_are_counted(tmp_path):
    question = {"role": "user", "content": "1 + 1?"}

    def talk(answer):
        return [question, {"role": "assistant", "content": answer}]

    path = file_of(
        tmp_path,
        {"chosen": talk("2"), "rejected": talk("3")},
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"},
        {"prompt": "1 + 1?", "chosen": "2", "rejected": "2"},
        {"prompt": "x" * 50, "chosen": "2", "rejected": "3"},
        {"prompt": "same until the cut", "chosen": "2" * 40 + "a", "rejected": "2" * 40 + "b"},
    )
    pairs, omissions = read_pairs(path, TOKENS, context=32)
    assert len(pairs) == 2
    for name in ("tokens", "weights"):
        assert pairs[0].row[name].shape == (2, 33)
        np.testing.assert_array_equal(pairs[0].row[name], pairs[1].row[name])
    chosen, rejected = pairs[0].row["tokens"]
    assert bytes(chosen[:11].tolist()) == USER + b"1 + 1?\0" + ASSISTANT + b"2\0"
    assert np.flatnonzero(chosen != rejected).tolist() == [9]
    assert pairs[0].row["weights"].sum(1).tolist() == [2, 2]
    assert omissions == {EQUAL: 2, LONG_PROMPT: 2, CUT_ANSWER: 2}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": "a"}, "line 1: found no rejected, expected `chosen` and `rejected`"),
        ({"chosen": "a", "rejected": "b"}, "line 1: found prompt: null, expected text"),
        ({"chosen": 1, "rejected": 2}, "line 1: found chosen: 1, expected a list of messages"),
        (
            {
                "chosen": minimind("one?", "a")["conversations"],
                "rejected": minimind("another?", "b")["conversations"],
            },
            "line 1: found two questions, expected one",
        ),
    ],
)
def test_a_bad_pair_is_named(tmp_path, row, said):
    with pytest.raises(BadInput, match=f"rows.jsonl, {said}"):
        read_pairs(file_of(tmp_path, row), TOKENS, context=32)


def test_windows_hold_as_many_conversations_as_fit(tmp_path):
    sizes = (3, 5, 2, 9, 1)
    path = file_of(tmp_path, *(minimind("a" * size, "b") for size in sizes))
    talks, _ = read_conversations(path, TOKENS, context=64)
    lengths = [len(talk.ids) for talk in talks]
    rows = pack(talks, 20, end=0)
    assert [row["segments"].max() for row in rows] == [2, 1, 2]
    for row in rows:
        assert {name: value.shape for name, value in row.items()} == dict.fromkeys(row, (20,))
        assert not row["weights"][row["segments"] == 0].any()
    first = rows[0]
    assert bytes(first["tokens"][first["segments"] == 2].tolist()) == text_of(talks[1])
    assert (first["segments"] == 1).sum() == lengths[0]


def test_every_row_comes_once_an_epoch_and_a_step_is_found_without_those_before():
    rows = [{"id": np.array(i)} for i in range(6)]
    batch = batches(rows, seed=0, batch=3)
    epochs = [[*batch(2 * i)["id"], *batch(2 * i + 1)["id"]] for i in range(3)]
    assert all(sorted(epoch) == list(range(6)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    again = batches(rows, seed=0, batch=3)
    np.testing.assert_array_equal(again(5)["id"], batch(5)["id"])
    others = [batches(rows, seed=1, batch=3)(step)["id"].tolist() for step in range(4)]
    assert others != [batch(step)["id"].tolist() for step in range(4)]


def test_every_tenth_row_is_held_out_and_all_of_them_are_evaluated():
    train, held_out = split(list(range(25)))
    assert held_out == [9, 19]
    assert len(train) == 23
    assert split([1, 2]) == ([1], [2])
    with pytest.raises(BadInput, match="found one row"):
        split([1])
    rows = [{"weights": np.ones(3)} for _ in range(5)]
    found = whole_batches(rows, batch=4)
    assert [batch["weights"].shape for batch in found] == [(4, 3), (4, 3)]
    assert sum(batch["weights"].sum() for batch in found) == 15
