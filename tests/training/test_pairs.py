from __future__ import annotations

import pytest
import torch

from bigkern.training import pairs
from bigkern.training.data import IGNORED, Split, encoder_from_state, encoder_state
from bigkern.training.errors import InputError
from bigkern.training.metrics import counted, evaluate, majority_accuracy


@pytest.mark.parametrize(
    "number, name",
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (87, "eighty-seven"),
        (100, "one hundred"),
        (40_917, "forty thousand nine hundred seventeen"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine"),
    ],
)
def test_numbers_in_words(number, name):
    assert pairs.in_words(number) == name


def test_all_numbers_have_names_of_their_own():
    assert len({pairs.in_words(number) for number in range(20_000)}) == 20_000
    with pytest.raises(ValueError, match="expected 0 to 999,999, got 1000000"):
        pairs.in_words(1_000_000)


def test_pairs_are_what_they_were_made_of():
    dataset = pairs.numbers_in_words(3000, 4)
    encoder = dataset.encoder
    assert encoder_from_state(encoder_state(encoder)) == encoder
    seen = []
    for split in (dataset.train, dataset.held_out):
        for (source, read), written in zip(split.inputs.tolist(), split.targets.tolist(), strict=True):
            number = int(encoder.decode(written))
            words = pairs.in_words(number).replace("-", " - ").split()
            assert [encoder.words[word] for word in source if word] == words
            assert read[0] == 1 and read[1 : len(str(number)) + 1] == written[: len(str(number))]
            assert written[len(str(number))] == 2 and set(written[len(str(number)) + 1 :]) <= {IGNORED}
            seen.append(number)
    assert len(set(seen)) == 3000 and len(dataset.held_out) == 300
    assert sum(number < 10 for number in seen) == 10 and sum(number > 999 for number in seen) == 2000


def test_a_users_pairs(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("text,label\n" + "".join(f"word {i},{i}\n" for i in range(20)))
    dataset = pairs.answered_texts(path)
    assert (len(dataset.train), len(dataset.held_out)) == (18, 2)
    again = pairs.read_split(path, dataset.encoder, "text", "label")
    assert len(again) == 20 and dataset.encoder.decode(again.targets[13].tolist()) == "13"
    for rows, message in (("text,label\na,x", "'x' has 'x'"), ("text,label\na,123", "'123' is longer than")):
        path.write_text(rows)
        with pytest.raises(InputError, match=message):
            pairs.read_split(path, dataset.encoder, "text", "label")
    with pytest.raises(InputError, match="1 rows are too few"):
        pairs.answered_texts(path)


def test_targets_that_are_left_out_do_not_count():
    logits = torch.randn(2, 3, 4)
    targets = torch.tensor([[1, 2, IGNORED], [3, IGNORED, IGNORED]])
    split = Split(logits, targets)
    result = evaluate(torch.nn.Identity(), split)
    kept = targets != IGNORED
    assert result.targets == int(counted(targets)) == 3
    assert result.loss == pytest.approx(torch.nn.functional.cross_entropy(logits[kept], targets[kept]).item())
    assert result.accuracy == pytest.approx((logits[kept].argmax(-1) == targets[kept]).double().mean().item())
    assert majority_accuracy(torch.tensor([[1, 1, 3, IGNORED]]), targets) == pytest.approx(1 / 3)
