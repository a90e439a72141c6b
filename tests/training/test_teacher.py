"""The frozen teacher of a run: how it is found, fed and refused, and that it never moves."""

import json
import shutil
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import workers
from family import batch, stages, taught_by, teacher_for, tiny_config
from runs import assert_bit_equal
from torch import nn

from wml_ray.checkpoints.load import load_tree
from wml_ray.cli.main import main
from wml_ray.config.schema import Config
from wml_ray.data.load import load_dataset
from wml_ray.distributed import WorkerRank
from wml_ray.errors import UserError
from wml_ray.methods.registry import METHODS, TaughtMethod
from wml_ray.methods.settings import TEACHER_METHODS
from wml_ray.training.events import EpochEnd
from wml_ray.training.start import build_method, initial_checkpoint
from wml_ray.training.teacher import load_teacher
from wml_ray.training.worker import WorkerContext, run_worker
from wml_ray.verbs.plan import plan


def student_of(folder, *overrides):
    return tiny_config(*taught_by(folder, "kd"), *overrides)


def test_the_methods_with_a_teacher_are_those_the_config_knows():
    assert {name for name, method in METHODS.items() if issubclass(method, TaughtMethod)} == set(TEACHER_METHODS)


def test_a_run_is_found_by_its_id_and_its_folder_and_teaches_with_the_peer_that_is_chosen(teacher_run, monkeypatch):
    tree, images = load_tree(teacher_run / "checkpoints" / "epoch-0001", trust=True), torch.randn(3, 1, 8, 8)
    monkeypatch.chdir(teacher_run.parent)
    for run in (teacher_run, teacher_run.name, f"{teacher_run}/"):
        config = student_of(run, "teacher.peer=2", f"run.storage_path={teacher_run.parents[1]}")
        teacher = load_teacher(config)
        assert str(teacher) == f"peer 2 of {teacher_run.name}, epoch 1"
        torch.testing.assert_close(teacher.logits(images), tree(images)[2:3])
    everyone = load_teacher(student_of(teacher_run, "teacher.peer=null"))
    torch.testing.assert_close(everyone.logits(images), tree(images))


def test_an_unfinished_run_of_the_same_id_in_another_experiment_is_passed_over(teacher_run, tmp_path):
    shutil.copytree(teacher_run, tmp_path / "b" / teacher_run.name)
    (tmp_path / "a" / teacher_run.name).mkdir(parents=True)
    assert load_teacher(student_of(teacher_run.name, f"run.storage_path={tmp_path}"))


@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_reach_the_teacher_normalised_as_it_was_trained(channels_last):
    """Whatever the student's statistics are."""
    teacher, (pixels, _) = teacher_for("kd"), batch(4)
    statistics = [((0.3,), (2.5,)), ((-40.0,), (0.01,))]
    optim = SimpleNamespace(channels_last=channels_last)
    for (mean, std), own in product(statistics, statistics):
        device, config = torch.device("cpu"), SimpleNamespace(optim=optim)
        teacher.receive(SimpleNamespace(mean=mean, std=std, device=device, config=config), own)
        expected = teacher.tree((pixels - own[0][0]) / own[1][0])
        logits = teacher.logits((pixels - mean[0]) / std[0])
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_student_of_another_subset_learns_and_its_teacher_never_moves(teacher_run, tmp_path):
    """The subset changes the statistics that images are normalised with."""
    before = [path.read_bytes() for path in sorted(teacher_run.rglob("*")) if path.is_file()]
    logged = {}
    context = WorkerContext(log=lambda step, metrics, timestamp_ms: logged.setdefault(step, dict(metrics)))
    overrides = ["data.train_images=640", "optim.learning_rate=0.03", f"run.storage_path={tmp_path}"]
    result = run_worker(student_of(teacher_run, *overrides), context)
    assert logged[3]["train/loss_teacher"] < logged[1]["train/loss_teacher"]
    assert result["predictions"].keys() == {"ensemble_average"}
    assert before == [path.read_bytes() for path in sorted(teacher_run.rglob("*")) if path.is_file()]


def test_nothing_that_a_training_does_to_its_method_reaches_the_teacher(teacher_run):
    config = student_of(teacher_run)
    dataset = load_dataset(config)
    teacher = load_teacher(config, dataset)
    before = {name: tensor.clone() for name, tensor in teacher.tree.state_dict().items()}
    start = initial_checkpoint(config, dataset)
    method = build_method(config, dataset.spec, start.metadata["channels"], teacher).train()
    inputs, _ = next(dataset.train_batches(0, WorkerRank()))
    outputs = method(inputs)
    nn.functional.mse_loss(outputs["logits_MBK"][0], outputs["teacher_BK"]).backward()
    assert not any(module.training for module in teacher.tree.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.tree.parameters())
    assert all(tensor.equal(before[name]) for name, tensor in teacher.tree.state_dict().items())
    assert {name.split(".")[0] for name in method.state_dict()} == {"tree"}
    assert "teacher_BK" not in method.eval()(inputs)


def test_a_step_with_a_teacher_compiles_as_one_graph(teacher_run):
    config = student_of(teacher_run)
    dataset = load_dataset(config)
    start = initial_checkpoint(config, dataset)
    method = build_method(config, dataset.spec, start.metadata["channels"], load_teacher(config, dataset))
    inputs, _ = next(dataset.train_batches(0, WorkerRank()))
    compiled = torch.compile(method, backend="eager", fullgraph=True)(inputs)
    for name, tensor in method(inputs).items():
        torch.testing.assert_close(compiled[name], tensor)


def interrupted(config, epoch):
    def stop(event):
        if isinstance(event, EpochEnd) and event.epoch == epoch:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker(config, WorkerContext(report=stop))


def test_a_resumed_student_ends_bit_equal_though_its_teacher_moved(teacher_run, tmp_path):
    whole = student_of(teacher_run, f"run.storage_path={tmp_path}", "run.name=whole")
    run_worker(whole, WorkerContext())
    interrupted(student_of(teacher_run, f"run.storage_path={tmp_path}"), epoch=2)
    moved = shutil.copytree(teacher_run, tmp_path / "moved" / teacher_run.name)
    resumed = student_of(moved, f"run.storage_path={tmp_path}")
    run_worker(resumed, WorkerContext())
    last = "checkpoints/epoch-0003"
    assert_bit_equal(resumed.run_folder / last, whole.run_folder / last)
    recorded = json.loads((resumed.run_folder / last / "plan.json").read_text())["teacher"]
    assert (recorded["run"], recorded["epoch"], recorded["peer"]) == (teacher_run.name, 1, 0)


def test_a_student_is_not_resumed_with_a_changed_teacher(teacher_run, tmp_path):
    copy = shutil.copytree(teacher_run, tmp_path / "copy" / teacher_run.name)
    config = student_of(copy, f"run.storage_path={tmp_path}")
    interrupted(config, epoch=1)
    other = tiny_config("method.name=independent", "optim.epochs=1", "data.flip=true", f"run.storage_path={tmp_path}")
    run_worker(other, WorkerContext())
    shutil.rmtree(copy)
    shutil.copytree(other.run_folder, copy)
    with pytest.raises(UserError, match="has changed since this run began; restore it, or delete the run's folder"):
        run_worker(config, WorkerContext())


def unfinished(folder):
    (folder / "result.json").unlink()


def damaged(folder):
    (folder / "checkpoints" / "epoch-0001" / "model.safetensors").write_bytes(b"")


def broken(folder):
    (folder / "result.json").write_text("{")


REFUSED = {
    "another seed": (None, ["seed=1"], r"trained with seed=0, this run has 1.*train a teacher with seed=1"),
    "another split": (None, ["data.validation_fraction=0.2"], r"trained with data.validation_fraction=0.1, this run"),
    "other images": (None, ["data.name=cifar10"], r"images of 1x8x8 and 10 classes, this run has 3x32x32 and 10"),
    "other code": (
        None,
        ["model.backbone=resnet20", "model.sharing=[1,1,2,4,4]"],
        r"would run family:stages, its model",
    ),
    "no such peer": (None, ["teacher.peer=4"], r"teacher.peer = 4: .* has the peers 0 to 3, or null for all"),
    "no such run": (None, ["teacher.run=elsewhere"], r"'elsewhere': there is no such folder, and no run of this id"),
    "unfinished": (unfinished, [], r"the run has not finished.*no result.json; train it to its end"),
    "damaged": (damaged, [], r"model.safetensors does not match its digest.*restore its files"),
    "no JSON": (broken, [], r"result.json is damaged .*; restore it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_teacher_that_does_not_fit_is_refused_before_the_training(case, teacher_run, tmp_path, capsys):
    change, overrides, message = REFUSED[case]
    folder = shutil.copytree(teacher_run, tmp_path / "teacher")
    if change:
        change(folder)
    config = student_of(folder, f"run.storage_path={tmp_path / 'results'}", *overrides)
    with pytest.raises(UserError, match=message) as caught:
        load_teacher(config)
    assert "\n" not in str(caught.value)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert main(["plan", str(tmp_path / "c.yaml")]) == 2
    assert str(caught.value) in capsys.readouterr().err


def test_the_estimate_of_memory_counts_the_teacher(teacher_run):
    def memory(*overrides):
        return plan(tiny_config(*overrides)).memory_bytes

    tree = load_tree(teacher_run / "checkpoints/epoch-0001", trust=True)
    (one, everyone) = (memory(*taught_by(teacher_run, "kd"), f"teacher.peer={peer}") for peer in (0, "null"))
    sizes = [sum(4 * p.numel() for p in network.parameters()) for network in (tree.peer(0), tree)]
    assert one - memory("method.name=independent") == sizes[0]
    assert everyone - one == sizes[1] - sizes[0]


def test_plan_and_dry_run_name_the_teacher(teacher_run, workplace, capsys):
    (workplace / "c.yaml").write_text(student_of(teacher_run).to_yaml())
    assert main(["plan", "c.yaml"]) == 0
    assert f"teacher     peer 0 of {teacher_run.name}, epoch 1" in capsys.readouterr().out
    assert main(["train", "c.yaml", "--dry-run"]) == 0
    assert f"teacher     ok  peer 0 of {teacher_run.name}, epoch 1" in capsys.readouterr().out
    assert main(["train", "c.yaml", "--dry-run", "seed=1"]) == 2
    assert "teacher     NO" in capsys.readouterr().out


def _trained_by_two(rank, folder, storage):
    config = student_of(folder, "optim.epochs=1", f"run.storage_path={storage}")
    result = run_worker(config, WorkerContext(WorkerRank(rank, 2)))
    return {name: value for name, value in (result or {"final": {}})["final"].items() if "latency" not in name}


@pytest.mark.slow
def test_two_workers_load_the_same_teacher(teacher_run, tmp_path):
    results, _ = workers.run(_trained_by_two, tmp_path, str(teacher_run), str(tmp_path / "results"))
    assert results["test/accuracy/method"] > 0.1


class PixelNetwork(nn.Module):
    """Its logits are the first ten pixels, which are exact if it receives pixels."""

    def forward(self, images):
        return images.flatten(1)[:, 20:30]


def of_pixels(spec):
    return PixelNetwork()


def of_stages(spec):
    return stages(spec)


def of_five_classes(spec):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))


def of_nothing(spec):
    return None


def test_a_users_own_network_receives_pixels():
    config = tiny_config("method.name=kd", f"teacher.function={__name__}:of_pixels")
    dataset = load_dataset(config)
    inputs, _ = next(dataset.evaluation_batches("test", WorkerRank()))
    logits = load_teacher(config, dataset).logits(inputs)
    pixels = dataset.images[dataset.splits["test"]].flatten(1)[: len(inputs), 20:30].float()
    torch.testing.assert_close(logits[0], pixels, rtol=0, atol=1e-4)


def test_a_users_own_network_may_be_given_in_stages_and_must_give_a_logit_a_class():
    def named(function):
        return tiny_config("method.name=kd", f"teacher.function={__name__}:{function}")

    one, again = load_teacher(named("of_stages")), load_teacher(named("of_stages"))
    assert one.record == again.record  # its initial tensors follow from the seed
    with pytest.raises(UserError, match=r"gives outputs of shape \(1, 5\) for an image; they must be .* \(1, 10\)"):
        load_teacher(named("of_five_classes"))
    with pytest.raises(UserError, match=r"must return a torch.nn.Module, or a list or dict of its stages"):
        load_teacher(named("of_nothing"))
    with pytest.raises(UserError, match=r"teacher.function = '.*:of_air' cannot be imported"):
        load_teacher(named("of_air"))


def test_a_method_without_a_teacher_reads_none():
    assert load_teacher(tiny_config("teacher.run=nowhere")) is None
    assert Config().teacher.run is None


def ctsl(folder, *overrides):
    return tiny_config(*taught_by(folder, "ctsl_mkt"), *overrides)


def test_peers_of_ctsl_mkt_start_with_the_tensors_and_widths_of_the_independent_run(teacher_run):
    config = ctsl(teacher_run)
    start, tree = (
        initial_checkpoint(config, load_dataset(config)),
        load_tree(teacher_run / "checkpoints/epoch-0001", trust=True),
    )
    assert start.model.keys() == tree.state_dict().keys()
    assert all(tensor.equal(start.model[name]) for name, tensor in tree.state_dict().items())
    sizes = json.loads((teacher_run / "result.json").read_text())["peers"]
    assert [peer["params"] for peer in start.metadata["peers"]] == [peer["params"] for peer in sizes]


def test_a_run_that_peers_of_ctsl_mkt_cannot_start_from_is_refused(teacher_run, tmp_path):
    with pytest.raises(UserError, match=r"goes on from all peers of an independent run; set teacher.run to one of"):
        load_teacher(ctsl(teacher_run, "teacher.peer=0"))
    with pytest.raises(UserError, match=r"its pruning.ratios.3 is 0.3, this run's 0.5, and this run goes on from its"):
        load_teacher(ctsl(teacher_run, "pruning.ratios.3=0.5"))
    dml = tiny_config("method.name=dml", "optim.epochs=1", f"run.storage_path={tmp_path}")
    run_worker(dml, WorkerContext())
    with pytest.raises(UserError, match=r"its method is dml; train it with method.name=independent"):
        load_teacher(ctsl(dml.run_folder))


@pytest.mark.parametrize("method", ["rkd", "fitnets"])
def test_methods_that_imitate_features_need_one_network_in_stages(method, teacher_run):
    with pytest.raises(UserError, match=rf"teacher.peer = null: {method} imitates one network; name a peer, such as 0"):
        load_teacher(tiny_config(*taught_by(teacher_run, method), "teacher.peer=null"))
    with pytest.raises(UserError, match=rf"returns one module, but {method} needs its stages; return a list or dict"):
        load_teacher(tiny_config(f"method.name={method}", f"teacher.function={__name__}:of_pixels"))
    assert load_teacher(tiny_config(f"method.name={method}", f"teacher.function={__name__}:of_stages"))
