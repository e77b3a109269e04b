from __future__ import annotations

import pytest
import torch

from bigkern.training import tagging
from bigkern.training.data import Split, encoder_from_state, encoder_state
from bigkern.training.errors import InputError
from bigkern.training.tagging import TAGS


def letters(text: str) -> str:
    """A letter a character: the first of its tag, and a dot for space."""
    return "".join("." if tag == 0 else TAGS[tag][0] for tag in tagging.tag_source(text).tolist())


def test_each_character_has_its_tokens_tag():
    assert letters("def f(x):  # a b\n") == "kkk.nonoo..ccccc."
    assert letters("y = 'a b' + 12\n") == "n.o.sssss.o.nn."
    assert letters("if a:\n    b\n") == "kk.no.....n."
    assert letters('s = """one\ntwo"""\n') == "n.o." + "s" * 13 + "."


def test_numbers_names_and_keywords_differ():
    tags = [TAGS[tag] for tag in tagging.tag_source("for x in 12").tolist()]
    assert [tags[i] for i in (0, 4, 6, 9)] == ["keyword", "name", "keyword", "number"]


def test_what_is_cut_off_is_read_as_far_as_it_goes():
    whole = tagging.tag_source('x = 1\ny = """one')
    assert 0 < len(whole) <= len('x = 1\ny = """one')
    assert torch.equal(whole[:6], tagging.tag_source("x = 1\n")[:6])


def test_the_library():
    dataset = tagging.library_tags(64)
    for part in (dataset.train, dataset.held_out):
        assert part.inputs.shape == part.targets.shape == (len(part), 64)
    assert len(dataset.train) > 5000 and len(dataset.held_out) > 500
    assert set(dataset.train.targets.unique().tolist()) == set(range(len(TAGS)))
    text = "".join(dataset.encoder.symbols[i] for i in dataset.train.inputs[:20].flatten().tolist())
    assert torch.equal(tagging.tag_source(text)[:1000], dataset.train.targets[:20].flatten()[:1000])
    assert encoder_from_state(encoder_state(dataset.encoder)) == dataset.encoder


def test_the_most_frequent_tag_of_each_character():
    train = Split(torch.tensor([[1, 1, 1, 2]]), torch.tensor([[3, 3, 4, 5]]))
    held_out = Split(torch.tensor([[1, 1, 2, 4]]), torch.tensor([[3, 4, 5, 0]]))
    assert tagging.most_frequent_tags(train, held_out) == 0.75


def test_a_file_too_short_is_refused():
    with pytest.raises(InputError, match="at least 64 are needed"):
        tagging.file_tags("x = 1\n" * 20, "short.py", 64)
