"""Runs as objects: the same from `train` and `load_run`, with networks that compute what the run reported."""

import shutil

import fsspec
import pandas as pd
import pytest
import torch
from family import tiny_config
from PIL import Image
from runs import client

import wml_ray
from wml_ray.checkpoints.checkpoint import epoch_folder
from wml_ray.data.load import load_dataset


@pytest.fixture
def dataset(trained):
    return load_dataset(tiny_config())


def accuracy(network, dataset, split):
    images, labels = dataset.pixels(dataset.splits[split])
    return float((network(images).argmax(-1) == labels).double().mean())


def loaded_as(kind, folder):
    if kind == "address":
        memory = fsspec.filesystem("memory")
        memory.put(str(folder), f"/{folder.name}", recursive=True)
        return f"memory:///{folder.name}"
    if kind == "MLflow run":
        return client().search_runs([client().get_experiment_by_name("wml").experiment_id])[0].info.run_id
    return folder if kind == "folder" else folder.name


@pytest.mark.parametrize("kind", ["folder", "run id", "MLflow run", "address"])
def test_a_run_is_the_same_by_its_folder_id_address_or_mlflow_run(trained, kind):
    run, trained_run = wml_ray.load_run(loaded_as(kind, trained)), wml_ray.train(tiny_config("optim.epochs=2"))
    assert not trained_run.trained_now
    pd.testing.assert_frame_equal(run.peers, trained_run.peers)
    pd.testing.assert_frame_equal(run.epochs, trained_run.epochs)
    assert run.config == trained_run.config
    assert run.config.run_id == tiny_config("optim.epochs=2").run_id
    assert [path.name for path in run.pictures] == [path.name for path in trained_run.pictures] != []


def test_the_networks_of_a_run_are_as_accurate_on_raw_images_as_it_reported(trained, dataset):
    """Nothing is lost in the normalisation, nor in taking a peer out of the tree."""
    run = wml_ray.load_run(trained, trust=True)
    for index, reported in run.peers.iterrows():
        assert accuracy(run.peer(index), dataset, "validation") == reported["validation_accuracy"]
        assert accuracy(run.peer(index), dataset, "test") == reported["test_accuracy"]
    for kind in ("average", "weighted"):
        reported = run.record["predictions"][f"ensemble_{kind}"]
        assert accuracy(run.ensemble(kind), dataset, "validation") == reported["validation_accuracy"]
    first, second = (run.epochs.loc[epoch, "val/accuracy/peer1"] for epoch in (1, 2))
    assert first != second
    assert accuracy(run.peer(1, epoch=1), dataset, "validation") == first


@pytest.mark.parametrize(
    "overrides",
    [
        {"wml": {"alpha": 0.3}, "seed": 5, "pruning.ratios.3": 0.25},
        {"wml.alpha": 0.3, "seed": 5, "pruning": {"ratios": [0, 0.1, 0.2, 0.25]}},
    ],
    ids=["nested", "dotted"],
)
def test_overrides_of_any_form_plan_the_run_of_the_command_line(workplace, monkeypatch, overrides):
    (workplace / "c.yaml").write_text(tiny_config().to_yaml())
    expected = wml_ray.load_config("c.yaml", ["wml.alpha=0.3", "seed=5", "pruning.ratios.3=0.25"])
    planned = []
    monkeypatch.setattr("wml_ray.verbs.train.check_storage", lambda folder: planned.append(folder.name) or 1 / 0)
    for config in ("c.yaml", workplace / "c.yaml", tiny_config(), tiny_config().model_dump(mode="json")):
        with pytest.raises(ZeroDivisionError):
            wml_ray.train(config, lambda event: None, **overrides)
    assert planned == [expected.run_id] * 4 != [tiny_config().run_id] * 4
    with pytest.raises(wml_ray.UserError, match=r"unknown key 'wml\.alfa'; did you mean 'wml\.alpha'"):
        wml_ray.train("c.yaml", wml={"alfa": 1})


def test_the_peer_of_the_limits_is_the_most_accurate_within_them(trained):
    run = wml_ray.load_run(trained, trust=True)
    peers = run.peers
    for limit in peers["macs"]:
        fitting = peers[peers["macs"] <= limit]
        best = fitting["validation_accuracy"].max()
        network = run.smallest_within(macs=limit)
        assert network.info.macs <= limit
        assert network.info.validation_accuracy == best
    with pytest.raises(wml_ray.UserError, match=r"nearest, peer 3 of .*, has .* MACs, .* above 10"):
        run.smallest_within(macs=10)


def test_code_of_ones_own_is_trusted_after_training_it_and_else_on_request_only(trained):
    assert wml_ray.train(tiny_config("optim.epochs=2")).peer(0).classes == tuple("0123456789")
    with pytest.raises(wml_ray.UserError, match=r"family:stages.*pass trust=True"):
        wml_ray.load_run(trained).peer(0)


def test_an_interrupted_run_shows_what_it_reached_and_gives_the_networks_of_an_epoch(trained, tmp_path):
    shutil.copytree(epoch_folder(trained / "checkpoints", 1), epoch_folder(tmp_path / "checkpoints", 1))
    run = wml_ray.load_run(tmp_path, trust=True)
    assert not run.finished
    assert list(run.epochs.index) == [1]
    assert list(run.peers["params"]) == list(wml_ray.load_run(trained).peers["params"])
    assert run.pictures == []
    assert "epoch 1 of 2" in run._repr_html_()
    assert run.peer(2, epoch=1).info.epoch == 1
    for unfinished in (lambda: run.peer(2), lambda: run.smallest_within(macs=1e9)):
        with pytest.raises(wml_ray.UserError, match="has not finished"):
            unfinished()


def test_a_notebook_shows_the_table_of_peers(trained):
    run = wml_ray.load_run(trained)
    assert run.peers.to_html() in run._repr_html_()
    assert "finished" in run._repr_html_()


def test_an_unknown_run_is_refused_with_the_places_that_were_searched(trained):
    for name in ("nowhere", "0" * 32):
        with pytest.raises(wml_ray.UserError, match=f"there is no run '{name}'.* below results, and none in MLflow"):
            wml_ray.load_run(name)
    with pytest.raises(wml_ray.UserError, match=r"is no run: it has neither result\.json nor a checkpoint"):
        wml_ray.load_run(trained.parent)


def test_evaluation_gives_the_reported_test_accuracies(trained):
    run = wml_ray.load_run(trained, trust=True)
    done = []
    found = wml_ray.evaluate(run, on_images=lambda *count: done.append(count))
    names = [*(f"peer{index}" for index in range(4)), "ensemble_weighted"]
    reported = [run.record["final"][f"test/accuracy/{name}"] for name in names]
    assert [each.network for each in found.networks] == names
    assert [each.accuracy for each in found.networks] == pytest.approx(reported, abs=1e-12)
    images = run.record["images"]["test"]
    assert done[-1] == (images, images)
    assert {each.images for each in found.networks} == {images}
    pairs = found.agreement.to_numpy()
    disagreement = 1 - (pairs.sum() - 4) / 12
    assert disagreement == pytest.approx(run.record["final"]["test/diversity"], abs=1e-12)


@pytest.fixture
def pictures(dataset, tmp_path):
    """The test images of digits as PNG files of one's own, tmp_path/<class>/<number>.png."""
    images, labels = dataset.pixels(dataset.splits["test"])
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / str(int(label))).mkdir(exist_ok=True)
        grey = (image[0].float() * (255 / 16)).round().to(torch.uint8)
        Image.fromarray(grey.numpy()).save(tmp_path / str(int(label)) / f"{number}.png")
    return tmp_path


def test_a_folder_of_the_test_images_as_png_files_gives_the_reported_test_accuracies(trained, pictures):
    run = wml_ray.load_run(trained, trust=True)
    found = wml_ray.evaluate(run, pictures, networks=[0, 3, "average"]).networks
    reported = [run.record["final"][f"test/accuracy/{name}"] for name in ("peer0", "peer3", "ensemble_average")]
    assert [each.accuracy for each in found] == pytest.approx(reported, abs=1e-12)


def test_a_folder_with_a_class_that_was_not_trained_is_refused_by_its_name(trained, pictures):
    (pictures / "3").rename(pictures / "three")
    with pytest.raises(wml_ray.UserError, match="has the classes three, which are none of the network's"):
        wml_ray.evaluate(wml_ray.load_run(trained, trust=True), pictures)
