import math

import pytest
import torch
import workers
from family import DIVERGES, taught_by, tiny_config

from wml_ray.config.schema import OptimConfig
from wml_ray.data.load import load_dataset
from wml_ray.distributed import WorkerRank
from wml_ray.errors import Diverged, UserError
from wml_ray.methods.base import StepContext
from wml_ray.methods.dml import Dml
from wml_ray.methods.registry import METHODS
from wml_ray.training.events import EpochEnd, StepProgress
from wml_ray.training.memory import training_memory_bytes
from wml_ray.training.optimizer import learning_rate
from wml_ray.training.precision import describe_precision
from wml_ray.training.start import build_method, initial_checkpoint
from wml_ray.training.teacher import load_teacher
from wml_ray.training.trainer import STEPS_BETWEEN_PREEMPTION_CHECKS, Trainer


def trainer_of(config, worker=None):
    dataset = load_dataset(config)
    start = initial_checkpoint(config, dataset)
    method = build_method(config, dataset.spec, start.metadata["channels"], load_teacher(config, dataset))
    trainer = Trainer(config, method, dataset, torch.device("cpu"), worker)
    trainer.load_state(start.model, start.state)
    return trainer


def fitted(*overrides):
    trainer, events = trainer_of(tiny_config(*overrides)), []
    trainer.fit(events.append)
    return trainer, events


def test_training_learns_and_reports_every_epoch_under_its_mlflow_names():
    trainer, events = fitted("optim.epochs=4")
    ends = [event for event in events if isinstance(event, EpochEnd)]
    assert [end.epoch for end in ends] == [1, 2, 3, 4]
    names = {f"val/accuracy/peer{i}" for i in range(4)} | {f"weights/peer{i}" for i in range(4)}
    names |= {
        "val/accuracy/ensemble_average",
        "val/accuracy/ensemble_weighted",
        "train/loss",
        "train/images_per_second",
    }
    assert names <= set(ends[-1].metrics)
    assert ends[-1].metrics["val/accuracy/ensemble_weighted"] > 0.6 > ends[0].metrics["val/accuracy/peer3"]
    assert ends[-1].metrics["train/loss"] < ends[0].metrics["train/loss"]
    assert trainer.evaluate("test")["test/accuracy/peer0"] > 0.6


def test_learned_weights_move_and_fixed_weights_do_not():
    learned, _ = fitted("optim.epochs=1", "wml.mirror_step_size=1")
    fixed, _ = fitted("optim.epochs=1", "wml.weights=fixed")
    assert learned.method.weights_M.std() > 1e-3
    assert math.isclose(float(learned.method.weights_M.sum()), 1.0, rel_tol=1e-12)
    assert fixed.method.weights_M.eq(0.25).all()


@pytest.mark.parametrize(
    "switch",
    [
        ["model.sharing=[4,4,4,4]", "pruning.ratios=[0,0,0,0]", "wml.alpha=0", "wml.weights=fixed"],  # independent
        ["wml.weights=fixed", "pruning.ratios=[0,0,0,0]"],  # mutual learning with equal weights
        ["method.name=dml", "optim.learning_rate=0.03"],
        ["model.sharing=[1,1,1,1]", "pruning.ratios=[0.2]"],  # one ordinary network
        ["wml.outer_data=holdout", "wml.unroll=exact"],
        ["wml.own_views=true", "data.flip=true"],
        ["optim.name=adamw", "optim.learning_rate=0.003", "optim.schedule=onecycle", "optim.gradient_clip=1"],
        ["optim.precision=bfloat16", "optim.warmup_epochs=0.5", "data.cutout=2", "data.flip=true"],
        ["optim.schedule=multistep", "optim.milestones=[1]", "optim.channels_last=false"],
    ],
    ids=lambda switch: switch[0],
)
def test_every_switch_trains(switch):
    _, events = fitted("optim.epochs=2", *switch)
    ends = [event for event in events if isinstance(event, EpochEnd)]
    assert ends[1].metrics["train/loss"] < ends[0].metrics["train/loss"]


def test_precision_auto_is_bit_equal_to_the_precision_that_it_names():
    config = tiny_config("optim.precision=auto")
    chosen, _, reason = describe_precision(config).partition(" ")
    assert reason.startswith("(the CPU has ")
    runs = [fitted("optim.epochs=1", f"optim.precision={precision}")[0] for precision in ("auto", chosen)]
    assert all(torch.equal(one, other) for one, other in zip(*(run.tree.parameters() for run in runs), strict=True))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_method_is_told_the_precision_of_the_run(precision, monkeypatch):
    told = set()
    monkeypatch.setattr(Dml, "after_step", lambda self, context, *batches: told.add(context.precision))
    fitted("method.name=dml", "optim.epochs=1", f"optim.precision={precision}")
    assert told == {precision}


def test_independent_training_is_as_if_each_peer_trained_alone():
    """Sharing, teaching and learned weights off: peer 0 moves by its own gradient at 1/M of the learning rate."""
    off = ["model.sharing=[2,2,2,2]", "wml.alpha=0", "wml.weights=fixed", "wml.balance=paper"]
    off += ["optim.weight_decay=0", "optim.epochs=1"]
    pair, _ = fitted("pruning.ratios=[0,0]", *off)
    config = tiny_config("pruning.ratios=[0,0]", *off)
    alone = trainer_of(config)
    network = alone.tree.peer(0)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True)
    for step, (inputs, targets) in enumerate(alone.dataset.train_batches(0, WorkerRank())):
        optimizer.param_groups[0]["lr"] = learning_rate(config.optim, step, alone.dataset.steps_per_epoch)
        loss = torch.nn.functional.cross_entropy(network(inputs), targets) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for one, other in zip(pair.tree.peer(0).parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_the_estimate_of_memory_counts_the_views_of_the_trunk():
    """Independent peers process as many images on own views as on one; copies that all share, M times as many."""
    bytes_of = {}
    for sharing in ("[4,4,4,4]", "[1,1,1,4]"):
        for own_views in ("false", "true"):
            overrides = [f"model.sharing={sharing}", "pruning.ratios=[0,0,0,0]", f"wml.own_views={own_views}"]
            trainer = trainer_of(tiny_config(*overrides))
            bytes_of[sharing, own_views] = training_memory_bytes(
                trainer.method, trainer.dataset.spec, 1000, trainer.config.optim
            )
    assert bytes_of["[4,4,4,4]", "true"] == pytest.approx(bytes_of["[4,4,4,4]", "false"], rel=0.05)
    assert bytes_of["[1,1,1,4]", "true"] > 3 * bytes_of["[1,1,1,4]", "false"]


def test_the_estimate_of_memory_counts_the_averages_of_pcl_once_and_what_is_trained_thrice():
    kdcl, pcl = (trainer_of(tiny_config(f"method.name={name}")) for name in ("kdcl", "pcl"))
    without, with_averages = (
        training_memory_bytes(trainer.method, trainer.dataset.spec, 0, trainer.config.optim) for trainer in (kdcl, pcl)
    )
    averages, classifier = (
        sum(parameter.nbytes for parameter in module.parameters())
        for module in (pcl.method.average, pcl.method.classifier)
    )
    assert with_averages - without == averages + 3 * classifier  # with its gradient and momentum


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_a_gradient_for_each_parameter_in_each_step(
    method, precision, teacher_run, monkeypatch
):
    """Two epochs on digits with peers of different widths. What counts is the label loss: a ramp may raise the sum."""
    options = ["optim.epochs=2", "optim.learning_rate=0.03", f"optim.precision={precision}"]
    options += taught_by(teacher_run, method)
    trainer, losses = trainer_of(tiny_config(*options)), []
    widths = {trainer.tree.get_submodule(trainer.tree.path(peer)[-2])[0].out_channels for peer in range(4)}
    assert len(widths) > 1

    monkeypatch.setattr("wml_ray.training.trainer.PROGRESS_INTERVAL_S", 0.0)  # an event a step

    def check_gradients(event):
        trained = [parameter for parameter in trainer.method.parameters() if parameter.requires_grad]
        assert all(parameter.grad.isfinite().all() for parameter in trained)
        if isinstance(event, EpochEnd):
            assert all(math.isfinite(value) for value in event.metrics.values())
            losses.append(event.metrics.get("train/loss_labels", event.metrics["train/loss"]))

    trainer.fit(check_gradients)
    assert losses[1] < losses[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_trainer_ends_bit_equal(method, teacher_run):
    options = ["optim.name=adamw", "optim.learning_rate=0.003", *taught_by(teacher_run, method)]
    whole, _ = fitted(*options)
    half, saved = trainer_of(tiny_config(*options)), {}

    def stop_after_two(event):
        if isinstance(event, EpochEnd) and event.epoch == 2:
            saved.update(model={k: v.clone() for k, v in half.model_state().items()})
            saved.update(state={k: v.clone() for k, v in half.state().items()})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half.fit(stop_after_two)
    resumed = trainer_of(tiny_config(*options))
    resumed.load_state(saved["model"], saved["state"])
    resumed.fit(lambda event: None)
    assert all(tensor.equal(whole.model_state()[name]) for name, tensor in resumed.model_state().items())
    assert all(tensor.equal(whole.state()[name]) for name, tensor in resumed.state().items())


class ThreeTerms(Dml):
    """Terms whose sum depends on the order of addition, not in the order of their names."""

    def losses(self, outputs, targets_B, context):
        labels = super().losses(outputs, targets_B, context)["labels"]
        return {"plus": torch.tensor(1e17), "minus": torch.tensor(-1e17), "labels": labels}


@pytest.mark.parametrize("method", [*METHODS, "three terms"])
def test_a_trainer_resumed_in_the_middle_of_an_epoch_ends_bit_equal(method, teacher_run, monkeypatch):
    """Also where outer batches were drawn before, and in the terms of the loss."""
    if method == "three terms":
        method = "dml"
        monkeypatch.setitem(METHODS, method, ThreeTerms)
    options = ["data.batch_size=32", "optim.epochs=1", *taught_by(teacher_run, method)]
    whole, ends = fitted(*options)
    cut, saved, events = trainer_of(tiny_config(*options)), {}, []

    def save_once(event):
        assert (event.epoch, event.step) == (0, STEPS_BETWEEN_PREEMPTION_CHECKS)
        saved.update(model={k: v.clone() for k, v in cut.model_state().items()})
        saved.update(state={k: v.clone() for k, v in sorted(cut.state().items())})  # the order of safetensors
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut.fit(lambda event: None, lambda: True, save_once)
    resumed = trainer_of(tiny_config(*options))
    resumed.load_state(saved["model"], saved["state"])
    resumed.fit(events.append)
    assert all(tensor.equal(whole.model_state()[name]) for name, tensor in resumed.model_state().items())
    assert all(tensor.equal(whole.state()[name]) for name, tensor in resumed.state().items())
    losses = [name for name in ends[-1].metrics if name.startswith("train/loss")]
    assert [events[-1].metrics[name] for name in losses] == [ends[-1].metrics[name] for name in losses]


def test_a_diverging_loss_names_peer_step_and_learning_rate():
    with pytest.raises(Diverged, match=r"loss of peers? .* epoch 1, step \d+, learning rate 100"):
        fitted(*DIVERGES)


def test_a_loss_that_grows_a_thousandfold_is_warned_of_once_with_the_key_to_lower():
    with pytest.warns(
        UserWarning, match=r"thousandfold, from \S+ to \S+ at epoch \d+.*lower optim.learning_rate"
    ) as found:
        fitted("optim.learning_rate=100", "optim.weight_decay=0", "optim.epochs=2")
    assert sum("thousandfold" in str(warning.message) for warning in found) == 1


def test_a_single_diverging_peer_is_named():
    trainer = trainer_of(tiny_config())
    with torch.no_grad():
        trainer.tree.get_submodule(trainer.tree.path(2)[-1])[2].bias[0] = torch.nan
    with pytest.raises(Diverged, match="the loss of peer 2 is not finite at epoch 1, step 1, "):
        trainer.fit(lambda event: None)


def test_learning_rate_schedules():
    steps = 10
    cosine = OptimConfig(epochs=10, learning_rate=1.0, warmup_epochs=1.0)
    rates = [learning_rate(cosine, step, steps) for step in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[0] < 0.1
    assert 0 < rates[-1] < 1e-3
    multistep = OptimConfig(epochs=10, learning_rate=1.0, schedule="multistep", milestones=[4, 8])
    rates = [learning_rate(multistep, step, steps) for step in range(100)]
    assert rates[39] == 1.0
    assert math.isclose(rates[40], 0.1)
    assert math.isclose(rates[80], 0.01)


def test_onecycle_is_torchs_one_cycle():
    config = OptimConfig(epochs=10, learning_rate=0.5, schedule="onecycle")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.5)
    twin = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=100)
    for step in range(100):
        assert math.isclose(learning_rate(config, step, 10), twin.get_last_lr()[0], rel_tol=1e-9)
        optimizer.step()
        if step < 99:
            twin.step()


def test_step_progress_counts_towards_the_total():
    _, events = fitted("optim.epochs=1")
    progress = [event for event in events if isinstance(event, StepProgress)]
    assert all(0 < event.step <= event.total_steps == 20 for event in progress)


def _first_gradients(rank, world_size, own_views):
    """One step's gradients on 5 images, 3 and 2 of them a worker, with BatchNorm over all of them."""
    config = tiny_config(
        "data.batch_size=5", "optim.sync_batchnorm=true", "optim.name=adamw", f"wml.own_views={own_views}"
    )
    trainer = trainer_of(config, WorkerRank(rank, world_size))
    batches = trainer.dataset.train_batches(0, trainer.worker, views=trainer.method.num_views)
    trainer.train_step(StepContext(0, 0, 3, 0.1), next(batches))
    return {name: p.grad for name, p in trainer.tree.named_parameters()}


@pytest.mark.parametrize("own_views", ["false", "true"])
def test_uneven_shares_give_the_gradient_of_the_whole_batch(tmp_path, own_views):
    split = workers.run(_first_gradients, tmp_path, 2, own_views)
    whole = _first_gradients(0, 1, own_views)
    for name, gradient in whole.items():
        torch.testing.assert_close(split[0][name], gradient, rtol=1e-3, atol=1e-5)
        assert split[1][name].equal(split[0][name])


def test_synchronised_batchnorm_runs_under_autocast(tmp_path):
    overrides = ["optim.epochs=1", "optim.sync_batchnorm=true", "optim.precision=bfloat16"]
    (_, _, metrics), _ = workers.run(_two_workers, tmp_path, overrides)
    assert math.isfinite(metrics["train/loss"])


def _two_workers(rank, overrides):
    trainer = trainer_of(tiny_config(*overrides), WorkerRank(rank, 2))
    metrics = []
    trainer.fit(lambda event: metrics.append(event.metrics) if isinstance(event, EpochEnd) else None)
    return trainer.model_state(), trainer.method.weights_M, metrics[-1]


def test_two_workers_equal_one_at_the_same_global_batch(tmp_path):
    overrides = ["optim.epochs=1", "data.batch_size=63", "optim.sync_batchnorm=true", "optim.learning_rate=0.01"]
    (model, weights, metrics), (other_model, other_weights, other_metrics) = workers.run(
        _two_workers, tmp_path, overrides
    )
    assert all(tensor.equal(other_model[name]) for name, tensor in model.items())
    assert weights.equal(other_weights)
    assert {k: v for k, v in metrics.items() if "second" not in k} == {
        k: v for k, v in other_metrics.items() if "second" not in k
    }
    alone, events = fitted(*overrides)
    for name, tensor in alone.model_state().items():
        torch.testing.assert_close(model[name], tensor, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(weights, alone.method.weights_M, rtol=1e-4, atol=1e-5)
    assert math.isclose(metrics["train/loss"], events[-1].metrics["train/loss"], rel_tol=1e-4)


def test_two_workers_with_their_own_batchnorm_stay_equal_to_each_other(tmp_path):
    (model, weights, _), (other_model, other_weights, _) = workers.run(_two_workers, tmp_path, ["optim.epochs=1"])
    assert all(tensor.equal(other_model[name]) for name, tensor in model.items())
    assert weights.equal(other_weights)
    assert weights.std() > 0


def test_more_workers_than_a_batch_can_feed_is_an_error():
    with pytest.raises(UserError, match=r"scale\.workers = 40 is too many"):
        trainer_of(tiny_config(), WorkerRank(0, 40))
