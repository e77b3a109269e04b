"""The command: exit statuses, one-line refusals, and each training command from end to end on small data."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import bigkern
from bigkern.cli import COMMANDS, main
from bigkern.training.demo import SHOWS
from bigkern.training.train import load_run
from bigkern.training.trainer import Trainer


@pytest.fixture(autouse=True)
def small_world(monkeypatch, tmp_path):
    """One thread, an empty folder to run in, and wide output."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    yield
    torch.set_num_threads(before)


def call(capsys, *argv):
    """(exit status, standard output, standard error) of a command run in this process."""
    try:
        status = main([str(word) for word in argv])
    except SystemExit as exit:
        status = exit.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *argv):
    """The one line of a refusal, checked to be one line with status 2."""
    status, _, err = call(capsys, *argv)
    assert status == 2, err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    assert err.startswith("bigkern")
    return err


@pytest.fixture
def reviews(tmp_path):
    """Two kinds of short texts that one word tells apart."""
    path = tmp_path / "reviews.csv"
    rows = [f"it was good day {i},praise\nit was bad day {i},blame" for i in range(40)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    folder = tmp_path / "pictures"
    for name, level in (("dark", 20), ("light", 220)):
        (folder / name).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (20, 20), level + i).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture
def alphabet(tmp_path):
    path = tmp_path / "alphabet.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz " * 60)
    return path


def test_version_and_module():
    done = subprocess.run(
        [sys.executable, "-m", "bigkern", "--version"],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.dirname(bigkern.__file__)),
    )
    assert (done.returncode, done.stdout) == (0, f"bigkern {bigkern.__version__}\n")


def test_help_lists_every_command(capsys):
    status, out, _ = call(capsys, "--help")
    assert status == 0
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys, name):
    status, out, _ = call(capsys, name, "--help")
    assert status == 0
    assert out.startswith(f"usage: bigkern {name}")


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "command"),
        (["swim"], "invalid choice: 'swim'"),
        (["train"], "model"),
        (["train", "cnn", "--wrong"], "--wrong"),
        (["train", "resnet"], "invalid choice: 'resnet'"),
        (["train", "cnn", "--epochs", "0"], "expected a whole number above 0"),
        (["train", "cnn", "--epochs", "many"], "many"),
        (["train", "cnn", "--lr", "-1"], "expected a number above 0"),
        (["train", "cnn", "--lr", "nan"], "expected a number above 0"),
        (["train", "cnn", "--data", "nowhere"], "--data nowhere: no such file or data set; cnn takes digits, mnist"),
        (["train", "gru", "--data", "nowhere"], "gru takes text, or a text file"),
        (["train", "transformer", "--data", "."], "transformer takes text, or a CSV file"),
        (["train", "attention-classifier", "--data", "."], "attention-classifier takes text, or a CSV file"),
        (["train", "autoencoder", "--data", "nowhere"], "autoencoder takes digits, mnist"),
        (["train", "mlp", "--data", "nowhere"], "mlp takes diabetes, or a CSV file of numbers"),
        (["train", "seq2seq", "--data", "nowhere"], "seq2seq takes numbers, or a CSV file with a text and a label"),
        (["train", "gpt", "--data", "nowhere"], "gpt takes text, or a text file"),
        (["train", "bert", "--data", "."], "bert takes text, or a CSV file"),
        (["train", "feature-transformer", "--data", "nowhere"], "feature-transformer takes digits, mnist"),
        (["train", "cnn", "--device", "abacus"], "--device abacus"),
        (["train", "cnn", "--resume"], "runs/cnn: no checkpoint there"),
        (["evaluate", "nowhere"], "nowhere: no checkpoint there"),
        (["predict", "nowhere"], "nowhere: no checkpoint there"),
        (["predict", "nowhere", "--temperature", "-1"], "expected 0 or more"),
        (["demo", "--only", "resnet"], "invalid choice"),
        (["demo", "--json", "nowhere/at/all.json"], "nowhere/at/all.json"),
    ],
)
def test_bad_input_is_one_line_and_status_2(capsys, argv, message):
    assert message in refused(capsys, *argv)


def test_an_unknown_backend_in_the_environment_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(bigkern.backend, "_requested", "abacus")
    assert "unknown backend 'abacus'" in refused(capsys, "train", "cnn")


def test_a_backend_that_cannot_serve_is_refused(capsys, reviews):
    with bigkern.use_backend("triton"):
        line = refused(capsys, "train", "transformer", "--data", reviews)
    assert "'triton' was asked for and cannot serve" in line


def test_a_fault_of_ours_is_not_dressed_up_as_bad_input(monkeypatch):
    monkeypatch.setattr("bigkern.training.train.choose_device", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["train", "cnn"])


def test_ctrl_c_is_one_line(capsys, monkeypatch):
    def interrupt(name):
        raise KeyboardInterrupt

    monkeypatch.setattr("bigkern.training.train.choose_device", interrupt)
    assert call(capsys, "train", "cnn") == (130, "", "bigkern train: interrupted\n")


def test_texts_from_training_to_prediction(capsys, reviews, tmp_path):
    status, out, _ = call(capsys, "train", "transformer", "--data", reviews, "--epochs", 8, "--out", "runs/reviews")
    assert status == 0
    plan, after = out.split("epoch 1/8")
    assert "64 samples to train on, 16 held out, 2 classes" in plan
    assert "bigkern (torch): MultiheadAttention, AddLayerNorm" in plan
    assert "plan: epochs 1 to 8 of 2 batches" in plan
    assert "saved to runs/reviews/checkpoint.pt" in after

    status, out, _ = call(capsys, "evaluate", "runs/reviews")
    assert status == 0
    assert "100.00%" in out and "50.00%" in out and "praise" in out

    status, out, _ = call(capsys, "predict", "runs/reviews", "--text", "it was bad day", "--top", 1)
    assert status == 0
    assert "blame" in out and "praise" not in out

    message = tmp_path / "message.txt"
    message.write_text("it was good day")
    assert "praise" in call(capsys, "predict", "runs/reviews", message, "--top", 1)[1]
    assert "message.md: no such file" in refused(capsys, "predict", "runs/reviews", "message.md")
    assert "--invert is for images" in refused(capsys, "predict", "runs/reviews", "--text", "a", "--invert")

    other = tmp_path / "other.csv"
    other.write_text("text,label\ngood,praise\nbad,anger\n")
    assert "label 'anger' is not one that the model knows" in refused(
        capsys, "evaluate", "runs/reviews", "--data", other
    )
    other.write_text("text,label\ngood,praise\nbad,blame\n")
    assert "2 samples" in call(capsys, "evaluate", "runs/reviews", "--data", other)[1]

    assert "holds a checkpoint already" in refused(
        capsys, "train", "transformer", "--data", reviews, "--out", "runs/reviews"
    )
    with reviews.open("a") as file:
        file.write("something new entirely,question\nand another,question\n")
    assert "no longer the data" in refused(capsys, "evaluate", "runs/reviews")


def test_standard_input(capsys, monkeypatch, reviews):
    import io

    call(capsys, "train", "transformer", "--data", reviews, "--epochs", 1, "--out", "run")
    monkeypatch.setattr(sys, "stdin", io.StringIO("it was good day"))
    assert "standard input" in call(capsys, "predict", "run")[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("  \n"))
    assert "standard input: empty" in refused(capsys, "predict", "run")


@pytest.mark.parametrize("model", ["cnn", "cnn-small", "feature-transformer"])
def test_images_from_training_to_prediction(capsys, pictures, model):
    extra = () if model == "cnn-small" else ("--image-size", 18)
    status, out, _ = call(
        capsys, "train", model, "--data", pictures, "--epochs", 6, "--batch-size", 4, "--out", "run", *extra
    )
    assert status == 0, out
    assert "28x28 grey" in out if model == "cnn-small" else "18x18 grey" in out
    assert "100.00%" in call(capsys, "evaluate", "run", "--data", pictures)[1]
    image = pictures / "dark" / "3.png"
    assert "dark" in call(capsys, "predict", "run", image, "--top", 1)[1].replace(str(image), "")
    assert "light" in call(capsys, "predict", "run", image, "--top", 1, "--invert")[1].replace(str(image), "")
    assert "give image files" in refused(capsys, "predict", "run")
    (pictures / "torn.png").write_text("torn")
    assert "torn.png: not an image" in refused(capsys, "predict", "run", pictures / "torn.png")


@pytest.mark.parametrize("model", ["gru", "lstm", "gpt"])
def test_writing_goes_on_with_the_alphabet(capsys, alphabet, model):
    epochs = {"gru": 40, "lstm": 6, "gpt": 20}[model]
    status, out, _ = call(
        capsys,
        "train",
        model,
        "--data",
        alphabet,
        "--epochs",
        epochs,
        "--batch-size",
        8,
        "--lr",
        "3e-3" if model == "gpt" else "1e-2",
        "--out",
        "run",
    )
    assert status == 0, out
    assert "bits per character" in call(capsys, "evaluate", "run")[1]
    start = "abcdefghijklmnopqrstuvwxyz " * 2 + "abcdefgh"
    written = call(capsys, "predict", "run", "--text", start, "--length", 8, "--temperature", 0)[1]
    assert written == f"{start}ijklmnop\n"


def test_answers_from_training_to_prediction(capsys, tmp_path):
    path = tmp_path / "colours.csv"
    rows = [f"the {name} one is number {i},{name[0].upper()}" for i in range(30) for name in ("red", "blue", "green")]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    status, out, _ = call(capsys, "train", "seq2seq", "--data", path, "--epochs", 6, "--batch-size", 8, "--out", "run")
    assert status == 0, out
    assert "81 samples to train on, 9 held out" in out and "bigkern (torch): Transformer" in out
    out = call(capsys, "evaluate", "run")[1]
    assert "whole answers right" in out and "100.00%" in out
    assert "90 samples" in call(capsys, "evaluate", "run", "--data", path)[1]
    status, out, err = call(capsys, "predict", "run", "--text", "the blue one is number 7", "--text", "a green one")
    rows = [line.split("\u2502")[1:3] for line in out.splitlines() if line.startswith("\u2502")]
    assert [answer.strip() for _, answer in rows] == ["B", "G"]
    assert "a green one: the model does not know a" in err
    assert "no column 'label'" in refused(capsys, "evaluate", "run", "--data", write(tmp_path / "other.csv", "text\na"))


def test_numbers_from_training_to_prediction(capsys, tmp_path):
    path = tmp_path / "sums.csv"
    rows = [f"{i % 7},{i % 5},{2 * (i % 7) - (i % 5)}" for i in range(70)]
    path.write_text("a,b,label\n" + "\n".join(rows) + "\n")
    status, out, _ = call(capsys, "train", "mlp", "--data", path, "--lr", "1e-2", "--epochs", 150, "--out", "run")
    assert status == 0, out
    assert "56 samples to train on, 14 held out, always answering the mean explains" in out
    assert "explained variance" in out
    assert "explained variance" in call(capsys, "evaluate", "run")[1]
    assert "70 samples" in call(capsys, "evaluate", "run", "--data", path)[1]
    rows = tmp_path / "rows.csv"
    rows.write_text("b,a\n4,0\n0,6\n")
    out = call(capsys, "predict", "run", rows)[1]
    values = [float(line.split("\u2502")[2]) for line in out.splitlines() if line.startswith("\u2502")]
    assert values == pytest.approx([-4, 12], abs=1.5)
    assert "no column 'a'" in refused(capsys, "predict", "run", write(tmp_path / "other.csv", "b\n1\n"))
    assert "give CSV files with the columns a, b" in refused(capsys, "predict", "run", "--text", "1,2")


def write(path, text):
    path.write_text(text)
    return path


@pytest.mark.parametrize("model", ["autoencoder", "autoencoder-conv"])
def test_images_drawn_again(capsys, pictures, model):
    status, out, _ = call(
        capsys, "train", model, "--data", pictures, "--epochs", 3, "--batch-size", 4, "--image-size", 10, "--out", "run"
    )
    assert status == 0, out
    assert "explained variance" in out and "drawn again" in out
    assert "mean squared error" in call(capsys, "evaluate", "run", "--data", pictures)[1]
    image = pictures / "dark" / "3.png"
    out = call(capsys, "predict", "run", image, "--draw", "drawn")[1]
    assert "mean squared error" in out and "drawn/3.png" in out
    from PIL import Image

    assert Image.open("drawn/3.png").size == (10, 10)


def test_interrupted_resumed_and_uninterrupted_are_equal(capsys, monkeypatch, reviews):
    arguments = ("train", "transformer", "--data", reviews, "--epochs", 2, "--batch-size", 16)
    assert call(capsys, *arguments, "--out", "whole")[0] == 0

    real, steps = Trainer.fit, []

    def press_ctrl_c(self, epochs, *, on_step, **rest):
        def step(trainer):
            on_step(trainer)
            steps.append(1)
            if len(steps) == 6:
                signal.raise_signal(signal.SIGINT)

        return real(self, epochs, on_step=step, **rest)

    monkeypatch.setattr(Trainer, "fit", press_ctrl_c)
    status, out, _ = call(capsys, *arguments, "--out", "parts")
    assert status == 130
    assert "saved to parts/checkpoint.pt after step 2 of epoch 2" in out
    assert "go on with: bigkern train transformer --out parts --resume" in out
    monkeypatch.undo()
    os.chdir(reviews.parent)

    assert "was trained with --lr 0.001, not 0.5" in refused(
        capsys, "train", "transformer", "--out", "parts", "--resume", "--lr", "0.5"
    )
    assert "holds a transformer, not a cnn" in refused(capsys, "train", "cnn", "--out", "parts", "--resume")
    status, out, _ = call(capsys, "train", "transformer", "--out", "parts", "--resume")
    assert status == 0, out
    whole, parts = (load_run(reviews.parent / name, torch.device("cpu"))[0] for name in ("whole", "parts"))
    for (key, ours), theirs in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key
    status, out, _ = call(capsys, "train", "transformer", "--out", "parts", "--resume")
    assert status == 0 and "has its 2 epochs already" in out


def test_a_diverging_loss_ends_training_in_one_line(capsys, reviews):
    line = refused(
        capsys, "train", "transformer", "--data", reviews, "--out", "run", "--lr", "1e30", "--optimizer", "sgd"
    )
    assert "the loss became" in line and "smaller --lr" in line


def test_a_tagger_is_trained_judged_and_used(capsys, tmp_path):
    source = tmp_path / "source.py"
    source.write_text("def twice(x):  # a comment\n    return 2 * x + len('text')\n\n\n" * 60)
    status, out, _ = call(capsys, "train", "gru-tagger", "--data", str(source), "--epochs", "12", "--out", "tags")
    assert status == 0, out
    status, out, _ = call(capsys, "evaluate", "tags", "--data", str(source))
    assert status == 0 and "comment" in out and "keyword" in out
    status, out, _ = call(capsys, "predict", "tags", "--text", "def twice(x):  # a comment")
    assert status == 0
    assert re.search(r"keyword +'def'", out) and re.search(r"comment +'# a comment'", out), out


def test_demo_shows_every_model(capsys):
    status, out, _ = call(capsys, "demo", "--quick", "--json", "figures.json")
    assert status == 0, out
    assert all(show.title in out for show in SHOWS.values())
    with open("figures.json") as file:
        report = json.load(file)
    assert [model["model"] for model in report["models"]] == list(SHOWS)
    for model in report["models"]:
        assert model["largest_difference"] < 1e-5
        assert -1 < model["majority_accuracy"] < 0.5
        assert model["accuracy"] == pytest.approx(model["accuracy_torch"], abs=1e-3)
        for speed in ("training_speed", "training_speed_torch", "inference_speed", "inference_speed_torch"):
            assert math.isfinite(model[speed]) and model[speed] > 0
    served = {model["model"]: model["layers"] for model in report["models"]}
    assert served["transformer"][0] == "bigkern (torch): MultiheadAttention, AddLayerNorm"
    assert served["cnn"][0] == "bigkern (torch): ConvBlock2d"
    assert any("GRU" in line for line in served["gru"])


@pytest.mark.slow
def test_demo_learns(capsys):
    status, _, _ = call(capsys, "demo", "--json", "figures.json")
    assert status == 0
    with open("figures.json") as file:
        models = {model["model"]: model for model in json.load(file)["models"]}
    assert models["cnn"]["accuracy"] >= 0.97
    assert models["cnn-small"]["accuracy"] >= 0.97
    assert models["cnn-log-softmax"]["accuracy"] >= 0.95
    assert models["rnn"]["accuracy"] >= 0.93
    # Below these no model without memory comes.
    assert models["gru-tagger"]["accuracy"] >= 0.83 > 0.7 > models["gru-tagger"]["baseline"]
    assert all(math.exp(models[name]["loss"]) < 0.85 * models[name]["baseline"] for name in ("gru", "lstm"))
    assert models["autoencoder"]["accuracy"] >= 0.85 and models["autoencoder-conv"]["accuracy"] >= 0.8
    assert models["mlp"]["accuracy"] >= 0.35
    assert models["seq2seq"]["accuracy"] >= 0.95
    for name in ("gpt", "gru", "lstm", "transformer", "attention-classifier", "self-attention-classifier"):
        assert models[name]["accuracy"] > models[name]["majority_accuracy"] + 0.1
