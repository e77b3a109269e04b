from __future__ import annotations

import pytest
import torch

from bigkern.training import data
from bigkern.training.data import (
    CharacterEncoder,
    ImageEncoder,
    NumberEncoder,
    Split,
    WordEncoder,
    encoder_from_state,
    encoder_state,
    held_out_indices,
)
from bigkern.training.errors import InputError, require


def write_images(folder, classes=("dark", "light"), count=5):
    from PIL import Image

    for level, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (9, 7), 200 * level + number).save(folder / name / f"{number}.png")
    return folder


def test_digits_are_all_there_and_no_digit_is_in_both_splits():
    dataset = data.digits()
    assert (len(dataset.train), len(dataset.held_out)) == (1438, 359)
    pixels = torch.cat([dataset.train.inputs, dataset.held_out.inputs]).flatten(1)
    assert len(pixels.unique(dim=0)) == 1797  # no two scans are alike, so none can be in both
    assert dataset.train.inputs.shape[1:] == (1, 8, 8)
    assert dataset.train.inputs.min() == 0 and dataset.train.inputs.max() == 1
    assert set(dataset.held_out.targets.tolist()) == set(range(10))


def test_enlarged_digits():
    small, large = data.digits(8), data.digits(28)
    assert large.train.inputs.shape[1:] == (1, 28, 28)
    assert torch.equal(small.held_out.targets, large.held_out.targets)


def test_held_out_indices_take_a_share_of_each_class():
    labels = [0] * 50 + [1] * 10 + [2] * 2
    train, held_out = held_out_indices(labels, 0.2)
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(62))
    assert torch.tensor(labels)[held_out].bincount().tolist() == [10, 2, 1]
    assert torch.equal(held_out, held_out_indices(labels, 0.2)[1])


def test_language_reference_windows_and_targets():
    steps = data.language_reference(16, every_step=True)
    assert steps.train.inputs.shape[1:] == steps.train.targets.shape[1:] == (16,)
    assert torch.equal(steps.train.inputs[:, 1:], steps.train.targets[:, :-1])
    last = data.language_reference(16, every_step=False, stride=5)
    text = last.encoder.decode(last.train.inputs[0].tolist()) + last.encoder.symbols[last.train.targets[0]]
    assert torch.equal(last.encoder.encode(text)[5:], torch.cat([last.train.inputs[1], last.train.targets[1:2]])[:12])


def test_package_sources_hold_out_whole_files():
    dataset = data.package_sources()
    assert len(dataset.classes) >= 2
    assert dataset.train.inputs.shape[1] == dataset.held_out.inputs.shape[1] == 64
    assert set(dataset.held_out.targets.tolist()) == set(range(len(dataset.classes)))
    train = {tuple(row) for row in dataset.train.inputs.tolist()}
    shared = sum(tuple(row) in train for row in dataset.held_out.inputs.tolist())
    assert shared <= 0.02 * len(dataset.held_out)  # licence headers are alike, code is not


def test_image_folder(tmp_path):
    seen = []
    dataset = data.image_folder(write_images(tmp_path), (1, 6, 8), lambda done, total: seen.append((done, total)))
    assert dataset.classes == ["dark", "light"]
    assert (len(dataset.train), len(dataset.held_out)) == (8, 2)
    assert seen[-1] == (10, 10)
    inputs, targets = dataset.train.batch(slice(None))
    assert inputs.shape == (8, 1, 6, 8) and inputs.dtype == torch.float32
    assert (inputs[targets == 0] < 0.1).all() and (inputs[targets == 1] > 0.7).all()


def test_image_channels_and_rows_stay_where_they_are(tmp_path):
    from PIL import Image

    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 1), (10, 20, 30))
    image.save(tmp_path / "a.png")
    read = ImageEncoder([3, 2, 3], []).read(tmp_path / "a.png")
    assert read[:, 1, 2].tolist() == [10, 20, 30]
    assert read.sum() == 60


def test_image_folder_refusals(tmp_path):
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match="at least two; found 1"):
        data.image_folder(tmp_path, (1, 8, 8))
    (tmp_path / "two").mkdir()
    with pytest.raises(InputError, match="no images in subfolders named one, two"):
        data.image_folder(tmp_path, (1, 8, 8))
    (tmp_path / "one" / "a.png").write_text("not an image")
    with pytest.raises(InputError, match=r"a\.png: not an image"):
        data.image_folder(tmp_path, (1, 8, 8))
    with pytest.raises(InputError, match="no such file"):
        ImageEncoder([1, 8, 8], []).read(tmp_path / "absent.png")


def test_a_class_of_one_image_is_refused(tmp_path):
    write_images(tmp_path, count=1)
    with pytest.raises(InputError, match="dark: a class needs at least two images"):
        data.image_folder(tmp_path, (1, 8, 8))


def test_labelled_texts(tmp_path):
    path = tmp_path / "texts.csv"
    rows = "\n".join(f'"good, fine {i}",yes\nbad {i},no' for i in range(5))
    path.write_text(f"text,label\n{rows}\n", encoding="utf-8-sig")
    dataset = data.labelled_texts(path, length=6)
    assert dataset.classes == ["no", "yes"]
    assert (len(dataset.train), len(dataset.held_out)) == (8, 2)
    assert dataset.train.inputs.shape == (8, 6)
    assert (dataset.train.inputs[:, -1] == 0).all()


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no column 'text'; its first line names nothing"),
        ("words,label\na,b\n", "no column 'text'; its first line names words, label"),
        ("text,label\n", "no rows"),
        ("text,label\na\n", "line 2 has too few columns"),
        ('text,label\n"a"b,c\n', "not CSV after line 1"),
        ("text,label\na,x\nb,x\n", "one class, 'x'"),
        ("text,label\na,x\nb,x\nc,y\n", "label 'y' has one row"),
    ],
)
def test_csv_refusals(tmp_path, content, message):
    path = tmp_path / "texts.csv"
    path.write_text(content)
    with pytest.raises(InputError) as refused:
        data.labelled_texts(path)
    assert message in str(refused.value)
    assert str(path) in str(refused.value)


def test_text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 20)
    dataset = data.text_file(path, 8, every_step=False)
    assert dataset.classes == ["\N{REPLACEMENT CHARACTER}", *"abcdefghij"]
    assert len(dataset.train) == (180 - 9) // 2 + 1


def test_text_file_refusals(tmp_path):
    path = tmp_path / "text.txt"
    with pytest.raises(InputError, match="no such file"):
        data.text_file(path, 8, every_step=True)
    path.write_text("short")
    with pytest.raises(InputError, match="5 characters are too few; at least 90"):
        data.text_file(path, 8, every_step=True)
    path.write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"not UTF-8 text \(byte 3\)"):
        data.text_file(path, 8, every_step=True)
    with pytest.raises(InputError, match="cannot be read"):
        data.text_file(tmp_path, 8, every_step=True)


@pytest.mark.parametrize(
    "encoder",
    [
        ImageEncoder([1, 8, 8], ["a", "b"]),
        CharacterEncoder.of("hello", 4),
        WordEncoder.of(["to be or not"], 4, ["x", "y"]),
        NumberEncoder(["a", "b"], "c", [1.0, 2.0, 3.0], [0.5, 1.0, 2.0]),
    ],
)
def test_encoders_survive_a_checkpoint(encoder):
    assert encoder_from_state(encoder_state(encoder)) == encoder


def test_characters_and_back():
    encoder = CharacterEncoder.of("hello", 4)
    assert encoder.decode(encoder.encode("hole").tolist()) == "hole"
    assert encoder.encode("z").tolist() == [0]


def test_words():
    encoder = WordEncoder.of(["The cat; the Dog"], 4, ["x", "y"])
    assert encoder.encode("the bird", "cat cat cat cat cat").tolist() == [
        [encoder.words.index("the"), 1, 0, 0],
        [encoder.words.index("cat")] * 4,
    ]


def test_bytes_become_fractions():
    inputs, _ = Split(torch.tensor([[0, 255]], dtype=torch.uint8), torch.tensor([0])).batch(slice(None))
    assert inputs.tolist() == [[0.0, 1.0]]


def test_a_missing_package_says_what_to_install():
    with pytest.raises(InputError, match=r"^this needs no_such_package: pip install nothing$"):
        require("no_such_package.sub", "nothing", "this")


def test_mnist_without_torchvision(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match="MNIST data set needs torchvision: pip install torchvision"):
        data.mnist(tmp_path)


def test_diabetes_is_standardised_by_its_training_part():
    dataset = data.diabetes()
    assert dataset.train.inputs.shape == (354, 10) and dataset.held_out.targets.shape == (88, 1)
    torch.testing.assert_close(dataset.train.inputs.mean(0), torch.zeros(10), rtol=0, atol=1e-5)
    torch.testing.assert_close(dataset.train.targets.std(0, correction=0), torch.ones(1), rtol=0, atol=1e-5)
    assert dataset.classes == ["progression"]


def test_table_of_numbers(tmp_path):
    path = tmp_path / "numbers.csv"
    path.write_text("a,label,b\n" + "\n".join(f"{i},{10 * i},5" for i in range(20)) + "\n")
    dataset = data.table_of_numbers(path, "label")
    assert dataset.encoder.columns == ["a", "b"] and (len(dataset.train), len(dataset.held_out)) == (16, 4)
    inputs, targets = dataset.train.batch(slice(None))
    torch.testing.assert_close(inputs[:, :1], targets)
    assert (inputs[:, 1] == 0).all()  # a column of equal values has no spread to divide by
    decoded = dataset.encoder.decode(targets).sort().values
    assert set(decoded.round().int().tolist()) <= {10 * i for i in range(20)}
    columns, rows = data.read_numbers(path, columns=["b", "a"])
    assert columns == ["b", "a"] and rows[3].tolist() == [5.0, 3.0]


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "no column 'label'; its first line names nothing"),
        ("a,b\n1,2\n", "no column 'label'; its first line names a, b"),
        ("a,label\n", "no rows below the first line"),
        ("label\n1\n", "no columns beside the target"),
        ("a,label\n1,2\n3\n", "line 3 has too few columns"),
        ("a,label\n1,two\n", "line 2: 'two' is not a finite number"),
        ("a,label\n1,inf\n", "line 2: 'inf' is not a finite number"),
        ("a,label\n1,2\n", "1 rows are too few; at least 10"),
    ],
)
def test_refusals_of_tables_of_numbers(tmp_path, content, message):
    path = tmp_path / "numbers.csv"
    path.write_text(content)
    with pytest.raises(InputError) as refused:
        data.table_of_numbers(path, "label")
    assert message in str(refused.value) and str(path) in str(refused.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_written_is_the_image_read(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    path = data.write_image(image.float() / 255, tmp_path / "a.png")
    assert torch.equal(ImageEncoder([channels, 5, 7], []).read(path), image)


def test_bytes_that_are_targets_become_fractions_too():
    images = torch.tensor([[0, 255]], dtype=torch.uint8)
    assert [part.tolist() for part in Split(images, images).batch(slice(None))] == [[[0.0, 1.0]]] * 2
