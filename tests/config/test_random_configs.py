"""Random configs train an epoch, or are refused within seconds by one line that names the key."""

import json
import random
import time

import pytest
import torch
from family import tiny_config

from wml_ray.config.load import known_keys, load_config
from wml_ray.data.load import load_dataset
from wml_ray.errors import Diverged, UserError
from wml_ray.training.memory import training_memory_bytes
from wml_ray.training.start import build_method, initial_checkpoint
from wml_ray.training.teacher import load_teacher
from wml_ray.training.trainer import Trainer

LIMIT_S = 5.0
LONG = "x" * 1000
VALUES = [
    *("0", "1", "-1", "2", "0.5", "1e-3", "1.0e+400", "-.inf", ".nan", "9" * 400, "9" * 5000, "0x1F", "0x_", "1_000"),
    *("010", "1:30", "1e300", "1e308", "1e9", "1000000000", "1000", "64", "1e-300", "-0.0", "2147483647", "1e31"),
    *("true", "no", "null", "~", "''", "x", "é", "digits", "adamw", "2020-01-01", LONG, '"\\0"', '"\\uDFFF"', "'a: b'"),
    *("[]", "[1, 2]", "[1, 1, 2, 4, 4]", "[[1]]", "[null]", "{}", "{a: 1}", "{1: 2}", "[0.1, 0.2]", "&a [1]", "*a"),
    *("!!int 3", "!!binary eA==", "!x y", "<<", "=", "%", "- 1", "|", "> x", "@", "`", "\t", "{", "]", "\\", '"'),
    *("'os:system'", "'os:nothing'", "'a/b:c'", "'a:../b'", "[" * 1500 + "]" * 1500, "[" + "1, " * 999 + "1]"),
]
PLAUSIBLE = [
    "0",
    "1",
    "2",
    "0.5",
    "1e-3",
    "64",
    "100",
    "true",
    "null",
    "adamw",
    "macs",
    "dml",
    "holdout",
    "exact",
    "onecycle",
]
OTHER_KEYS = ("wml", "data", "x", "wml.x", "model.sharing.0", "pruning.ratios.9", "", ".", "a.b.c")
KEYS = [key for key in (*known_keys(), *OTHER_KEYS) if key != "optim.compile"]  # to compile takes long


def random_config(draw):
    """The text of a file, the tiny config with some random values, overrides, and the keys that were drawn."""
    config = tiny_config("data.train_images=128", "wml.update_every=1").dump()
    sections = {
        name: value if name == "seed" else {k: json.dumps(v) for k, v in value.items()}
        for name, value in config.items()
    }
    drawn = [draw.choice(KEYS) for _ in range(draw.randint(0, 2))]
    for name, _, key in (drawn_key.partition(".") for drawn_key in drawn):
        if key and isinstance(sections.setdefault(name, {}), dict):
            sections[name][key] = draw.choice(draw.choice((VALUES, PLAUSIBLE)))
        else:
            sections[name] = draw.choice(draw.choice((VALUES, PLAUSIBLE)))
    lines = []
    for name, section in sections.items():
        if isinstance(section, dict):
            section = "{" + ", ".join(f"{key}: {value}" for key, value in section.items()) + draw.choice("}" * 99 + " ")
        lines.append(f"{name}: {section}")
    overridden = [draw.choice(KEYS) for _ in range(draw.randint(0, 1))]
    return (
        "\n".join(lines),
        [f"{key}={draw.choice(draw.choice((VALUES, PLAUSIBLE)))}" for key in overridden],
        drawn + overridden,
    )


def train_an_epoch(config):
    class Enough(Exception):
        pass

    def stop(event):
        raise Enough

    dataset = load_dataset(config)
    start = initial_checkpoint(config, dataset)
    method = build_method(config, dataset.spec, start.metadata["channels"], load_teacher(config, dataset))
    training_memory_bytes(method, dataset.spec, config.data.batch_size, config.optim)
    trainer = Trainer(config, method, dataset, torch.device("cpu"))
    trainer.load_state(start.model, start.state)
    with pytest.raises(Enough):
        trainer.fit(stop)


def assert_one_line(message, keys):
    assert message.isprintable(), message
    assert len(message) < 1500, message
    assert "x" * 201 not in message
    assert "9" * 201 not in message
    named = {word for key in keys for word in (key.rpartition(".")[2], ".".join(key.split(".")[:2]))}
    assert "(line " in message or any(name in message for name in named), (keys, message)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_no_random_config_gives_a_traceback_or_takes_long(empty_workplace, count):
    draw = random.Random(count)
    trained, refused = set(), 0
    path = empty_workplace / "config.yaml"
    train_an_epoch(tiny_config())  # imports
    for _ in range(count):
        text, overrides, keys = random_config(draw)
        path.write_text(text)
        start_s = time.process_time()
        try:
            config = load_config(path, overrides)
            effective = config.model_dump_json(exclude={"run", "scale", "seed"})
            if effective not in trained:
                trained.add(effective)
                train_an_epoch(config)
        except (UserError, Diverged) as error:
            assert_one_line(str(error).replace(str(path), "FILE"), keys)
            refused += 1
        else:
            path.write_text(config.to_yaml())
            assert load_config(path) == config
            assert config.run_id.isprintable()
        assert time.process_time() - start_s < LIMIT_S, (text, overrides)
    print(f"{refused} of {count} refused, {len(trained)} different ones trained")
    assert count / 4 < refused < count
