"""`wml-ray export` and `register`: the files, and mistakes, each one line with exit code 2 and no file."""

import shutil
import sys

import pytest

from wml_ray.cli.main import main

WORDS = {
    "export": ["--to", "onnx"],
    "register": ["--name", "digits-small"],
}


@pytest.fixture
def refusal(teacher_run, empty_workplace, capfd):
    """A function that calls a verb on the run and returns the one line of its refusal."""

    def call(verb, *words, run=teacher_run):
        assert main([verb, str(run), *WORDS[verb], *words]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert list(empty_workplace.iterdir()) == []
        return line

    return call


@pytest.fixture
def unfinished(teacher_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unfinished") / "run"
    shutil.copytree(teacher_run, folder)
    (folder / "result.json").unlink()
    return folder


@pytest.mark.parametrize("verb", ["export", "register"])
def test_a_run_or_network_that_does_not_exist_is_refused(refusal, verb):
    assert "there is no run 'nowhere'" in refusal(verb, "--peer", "0", run="nowhere")
    assert "no peer 9; give a number from 0 to 3" in refusal(verb, "--peer", "9", "--trust")
    assert "--peer best: give the number of a peer" in refusal(verb, "--peer", "best", "--trust")
    assert "has no checkpoint of epoch 7; it has 0, 1" in refusal(verb, "--peer", "0", "--epoch", "7", "--trust")
    assert "pass trust=True (--trust)" in refusal(verb, "--peer", "0")


def test_an_unfinished_run_needs_an_epoch(refusal, unfinished, empty_workplace):
    message = refusal("export", "--peer", "0", "--trust", run=unfinished)
    assert "has not finished; train it to its end, or name an epoch (--epoch N): epoch 1 is the last" in message
    words = ["export", str(unfinished), "--peer", "0", "--trust", "--epoch", "1", "--to", "safetensors"]
    assert main([*words, "--out", "there"]) == 0
    files = {path.name for path in (empty_workplace / "there").iterdir()}
    assert {"model.safetensors", "plan.json", "card.md"} <= files


@pytest.mark.parametrize("library", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_library_is_named_with_its_extra(refusal, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    message = refusal("export", "--peer", "0", "--trust")
    assert f"{library} is not installed" in message
    assert "pip install 'wml_ray[onnx]'" in message


def test_what_mlflow_cannot_register_is_refused_before_the_export(refusal):
    assert "has no MLflow run" in refusal("register", "--peer", "0", "--trust")
    assert "--alias v1 is reserved by MLflow" in refusal("register", "--peer", "0", "--trust", "--alias", "v1")
    assert "--name" in refusal("register", "--peer", "0", "--trust", "--name", "a/b")
