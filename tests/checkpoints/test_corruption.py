"""Checkpoints with damaged or edited files: a run ends as it would have, or is refused by one line."""

import hashlib
import json
import os
import random
import shutil
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from family import tiny_config
from runs import assert_bit_equal, history_of
from safetensors.torch import load_file, save_file

from wml_ray.checkpoints.checkpoint import DIGESTS, FILES
from wml_ray.checkpoints.load import load_tree
from wml_ray.errors import UserError
from wml_ray.training.events import EpochEnd
from wml_ray.training.latency import Latency
from wml_ray.training.worker import WorkerContext, run_worker

RUN = ("data.train_images=128", "optim.epochs=4", "run.keep_checkpoints=3")
WRONG = [None, True, -1, 1.5, 1e300, "", "x", [], [None], {}, {"a": 1}, [[1]], 10**30]


class Stop(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def no_latency():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("wml_ray.training.result.measure_latency", lambda *_: Latency(1.0, 0.0))
        yield


def interrupt_after_epoch_3(config):
    def stop(event):
        if isinstance(event, EpochEnd) and event.epoch == 3:
            raise Stop

    with pytest.raises(Stop):
        run_worker(config, WorkerContext(report=stop))


def facts(result):
    """A result without what differs between two equal trainings."""
    others = ("peers", "images", "predictions", "selects", "test_epoch", "skipped_images", "tree")
    return history_of(result), {key: result[key] for key in others}


@dataclass
class Case:
    """A checkpoint that is to be damaged, the one of the epoch before, and one of another run."""

    checkpoint: Path
    before: Path
    other: Path
    draw: random.Random

    def any_file(self, *names):
        return self.checkpoint / self.draw.choice(names or FILES)

    def sum_again(self):
        lines = [
            f"{hashlib.sha256((self.checkpoint / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES[:-1]
        ]
        (self.checkpoint / DIGESTS).write_text("".join(lines))


def flip_a_bit(case):
    path = case.any_file()
    content = bytearray(path.read_bytes())
    content[case.draw.randrange(len(content))] ^= 1 << case.draw.randrange(8)
    path.write_bytes(content)


def flip_the_sign_of_a_weight(case):
    """A change that only the digest can tell: the tensors have the largest dtypes first, so floats are last."""
    path = case.checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x80
    path.write_bytes(content)


def cut(case):
    path = case.any_file()
    os.truncate(path, case.draw.randrange(path.stat().st_size))


def append(case):
    with case.any_file().open("ab") as file:
        file.write(case.draw.randbytes(case.draw.randint(1, 100)))


def zero_a_block(case):
    path = case.any_file()
    content = bytearray(path.read_bytes())
    start = case.draw.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    path.write_bytes(content)


def fill_with_noise(case):
    path = case.any_file()
    path.write_bytes(case.draw.randbytes(path.stat().st_size))


def replace_by_something_else(case):
    path = case.any_file()
    path.unlink()
    kind = case.draw.choice(["nothing", "folder", "pipe", "link", "loop"])
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(case.before / path.name)
    elif kind == "loop":
        path.symlink_to(path)


def take_a_file_of(case, attribute):
    path = case.any_file()
    shutil.copyfile(getattr(case, attribute) / path.name, path)


def take_all_files_of(case, attribute):
    shutil.rmtree(case.checkpoint)
    shutil.copytree(getattr(case, attribute), case.checkpoint)


def edit_tensors(case):
    path = case.any_file("model.safetensors", "trainer.safetensors")
    tensors = load_file(path)
    name = case.draw.choice(sorted(tensors))
    tensor = tensors[name]
    edits = {
        "drop": lambda: tensors.pop(name),
        "add": lambda: tensors.update({case.draw.choice(["more", "optimizer/exp_avg/x", ""]): torch.zeros(2)}),
        "rename": lambda: tensors.update({f"{name}x": tensors.pop(name)}),
        "reshape": lambda: tensors.update({name: tensor.reshape(1, -1).clone()}),
        "lengthen": lambda: tensors.update({name: torch.cat([tensor.flatten(), tensor.flatten()])}),
        "empty": lambda: tensors.update({name: tensor.new_zeros(0)}),
        "cast": lambda: tensors.update({name: tensor.to(torch.int8 if tensor.dtype != torch.int8 else torch.half)}),
        "widen": lambda: tensors.update({name: tensor.double() if tensor.is_floating_point() else tensor.float()}),
        "drop all": tensors.clear,
    }
    edits[case.draw.choice(sorted(edits))]()
    save_file(tensors, path)


def edit_header(case):
    """Change bytes of the JSON at the beginning of a file of tensors, or the length of it."""
    path = case.any_file("model.safetensors", "trainer.safetensors")
    content = bytearray(path.read_bytes())
    content[case.draw.randrange(8 + int.from_bytes(content[:8], "little"))] = case.draw.randrange(256)
    path.write_bytes(content)


def places(value, path=()):
    """The paths to all values nested in a JSON value."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from places(below, (*path, key))


def kind(value):
    return float if type(value) is int else type(value)


def optional(place):
    """The peak memory, and metrics that not every method has."""
    *_, last = place
    return last == "peak_memory_bytes" or (place[-2:-1] == ("metrics",) and not last.startswith(("val/", "train/")))


def edit_plan(case):
    """Remove a value of plan.json, or replace it by one of another type. Another value of the same type, with sums that
    fit, is nothing that a program could tell.
    """
    path = case.checkpoint / "plan.json"
    plan = json.loads(path.read_text())
    top = case.draw.choice(sorted(plan))  # else most values are metrics
    *parents, last = case.draw.choice([place for place in places(plan) if place[0] == top])
    container = plan
    for key in parents:
        container = container[key]
    old = container[last]
    if case.draw.random() < 0.3 and not optional((*parents, last)):
        del container[last]
    else:
        container[last] = case.draw.choice([new for new in WRONG if kind(new) != kind(old)])
    path.write_text(json.dumps(plan))


def edit_what_a_plan_says_of_its_run(case):
    path = case.checkpoint / "plan.json"
    plan = json.loads(path.read_text())
    edits = {
        "run_id": lambda: plan.update(run_id=json.loads((case.other / "plan.json").read_text())["run_id"]),
        "config": lambda: plan["config"]["optim"].update(learning_rate=0.01),
        "seed": lambda: plan["config"].update(seed=1),
        "epoch": lambda: plan.update(epoch=plan["epoch"] + case.draw.choice([-1, 1, 100])),
        "history": lambda: plan["history"].pop(case.draw.randrange(len(plan["history"]))),
        "twice": lambda: plan["history"].append(plan["history"][-1]),
        "order": plan["history"].reverse,
        "widths": lambda: plan["channels"].update({next(iter(plan["channels"])): [1]}),
        "format": lambda: plan.update(format=2),
    }
    edits[case.draw.choice(sorted(edits))]()
    path.write_text(json.dumps(plan))


def replace_plan_by_other_json(case):
    texts = ["", "null", "[]", "{}", "1", '"x"', "{", "[" * 5000, "{" * 5000, '{"epoch": 3}', "\ufeff{}", "NaN"]
    (case.checkpoint / "plan.json").write_text(case.draw.choice(texts))


DAMAGE = [flip_a_bit, cut, append, zero_a_block, fill_with_noise, replace_by_something_else]
DAMAGE += [partial(take_a_file_of, attribute=name) for name in ("before", "other")]
DAMAGE += [partial(take_all_files_of, attribute=name) for name in ("before", "other")]
EDITS = [edit_tensors, edit_header, edit_plan, edit_plan, edit_what_a_plan_says_of_its_run, replace_plan_by_other_json]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The checkpoints of two interrupted runs, by seed, and the last checkpoint and the result of the first run."""
    folder = tmp_path_factory.mktemp("trained")
    for seed in ("seed=1", "seed=0"):
        config = tiny_config(*RUN, seed, f"run.storage_path={folder}")
        interrupt_after_epoch_3(config)
        shutil.copytree(config.run_folder / "checkpoints", folder / seed)
    result = run_worker(config, WorkerContext())
    return folder, config.run_folder / "checkpoints" / "epoch-0004", facts(result)


@pytest.mark.parametrize("count", [10, pytest.param(500, marks=pytest.mark.nightly)])
def test_no_corruption_changes_a_result_silently_or_ends_in_a_raw_error(trained, tmp_path, count):
    """The first half as faults of a disk leave them, the second half with sums that fit the edited files, and one
    wrong bit in a weight.
    """
    folder, last, expected = trained
    draw = random.Random(count)
    ends, messages = Counter(), []
    for number in range(count + 1):
        config = tiny_config(*RUN, "seed=0", f"run.storage_path={tmp_path / str(number)}")
        checkpoints = config.run_folder / "checkpoints"
        shutil.copytree(folder / "seed=0", checkpoints)
        case = Case(checkpoints / "epoch-0003", checkpoints / "epoch-0002", folder / "seed=1" / "epoch-0003", draw)
        edit = draw.choice(DAMAGE if number < count / 2 else EDITS) if number < count else flip_the_sign_of_a_weight
        edit(case)
        if count / 2 <= number < count:
            case.sum_again()
        with suppress(UserError):
            load_tree(case.checkpoint, trust=True)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                result = run_worker(config, WorkerContext())
            except UserError as error:
                messages.append(str(error))
                ends["refused"] += 1
                continue
            except Exception as error:
                raise AssertionError(f"case {number}, {edit}: {error!r}") from error
        assert_bit_equal(checkpoints / "epoch-0004", last)
        assert facts(result) == expected, (number, edit)
        passed_over = [str(warning.message) for warning in caught if "before it is used" in str(warning.message)]
        messages += passed_over
        ends["fell back to the epoch before" if passed_over else "harmless"] += 1
        shutil.rmtree(tmp_path / str(number))
    assert not [message for message in messages if not message.isprintable()]
    print(f"{count} corruptions:", dict(ends))
    assert ends["fell back to the epoch before"] > count / 2
