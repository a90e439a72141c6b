"""Config files and overrides that are wrong in every way give one line, never a traceback."""

import random

import pytest

from wml_ray.config.load import known_keys, load_config, parse_config
from wml_ray.config.schema import Config
from wml_ray.errors import UserError

BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [*{last}, *{last}]\n" for last, name in zip("abcd", "bcde", strict=True)
)
LONG = "x" * 1000


@pytest.fixture
def refused(tmp_path):
    """Load a config file with this text, and overrides; returns the one line it is refused with."""

    def load(text, *overrides):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        with pytest.raises(UserError) as raised:
            load_config(path, overrides)
        return one_line(raised.value).replace(str(path), "FILE")

    return load


def one_line(error):
    assert str(error).isprintable(), error
    assert len(str(error)) < 1500, error
    assert "x" * 201 not in str(error)
    return str(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nwml: {alpha: 0.1}\nseed: 2\n", "FILE is not valid YAML: key 'seed' is given twice (line 3)"),
        ("wml:\n  alpha: 0.1\n  alpha: 0.2\n", "key 'alpha' is given twice (line 3)"),
        ("1: 2\n", "key '1' must be a word such as seed (line 1)"),
        ("? [a, b]\n: 1\n", "must be a word"),
        ("2020-01-01: 1\n", "unknown key '2020-01-01'"),
        ("seed: 2020-01-01\n", "seed = '2020-01-01': input should be a valid integer"),
        (f"seed: {'9' * 5000}\n", "99… (line 1)"),
        (f"seed: {'9' * 4000}\n", "seed = 9999999999"),
        ("data: {batch_size: 1.0e+400}\n", "data.batch_size = inf"),
        ("optim: {learning_rate: 1.0e+400}\n", "optim.learning_rate = inf"),
        (f"wml: {'[' * 5000}{']' * 5000}\n", "nested deeper than 10 levels"),
        (f"optim: {'{a: ' * 5000}", "nested deeper than 10 levels"),
        (BOMB, "aliases such as *name are not supported (line 2)"),
        ("data: &a [*a]\n", "aliases such as *name are not supported"),
        ('data: {root: "a\\0b"}\n', "control character in"),
        ('"wml\\n": 1\n', "control character in"),
        ('data: {root: "\\ud800"}\n', "control character in"),
        ("seed: !!python/object/apply:os.getcwd []\n", "tags such as !!int are not supported"),
        ("seed: !!timestamp soon\n", "tags such as !!int are not supported"),
        (f"data: {{name: {LONG}}}\n", "data.name = 'xxx"),
        (f"{LONG}: 1\n", "unknown key 'xxx"),
        (f"wml: {{{LONG}: 1}}\n", "unknown key 'wml.xxx"),
        (f"model: {{sharing: [{'1, ' * 999}3, 4]}}\n", "model.sharing = [1, 1, 1"),
        (f"scale: {{workers: [{LONG}]}}\n", "scale.workers = ['xxx"),
        ("wml: {inner_steps: 5}\n", "wml.update_every"),
        ("wml: {inner_step: 0.1}\n", "wml.unroll_learning_rate"),
    ],
    ids=lambda value: value[:20],
)
def test_a_mistake_in_a_file_is_one_line_with_the_key(refused, text, expected):
    assert expected in refused(text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("wml.alpha={alpha: 1, alpha: 2}", "key 'alpha' is given twice"),
        ("data.root={", "override 'data.root={': the value is not valid YAML"),
        (f"seed={'9' * 5000}", "override 'seed=999"),
        (f"pruning.ratios.{'9' * 5000}=0", "the list has entries 0 to 3"),
        ("pruning.ratios.²=0", "the list has entries 0 to 3"),
        ("wml.al\npha=1", r"unknown key 'wml.al\npha'"),
        (f"{LONG}=1", "unknown key 'xxx"),
        (f"{LONG}", "must have the form key=value"),
        ('data.root="\\0"', "control character"),
    ],
    ids=lambda value: value[:20],
)
def test_a_mistake_in_an_override_is_one_line_with_the_key(refused, override, expected):
    assert expected in refused("", override)


def test_a_date_is_text(tmp_path):
    (tmp_path / "c.yaml").write_text("run: {name: 2020-01-01}")
    config = load_config(tmp_path / "c.yaml", ["data.root=2020-01-01"])
    assert (config.run.name, config.data.root) == ("2020-01-01", "2020-01-01")


@pytest.mark.parametrize("path", ["a\0b", "a\nb", "x" * 5000, "s4://bucket/config.yaml"])
def test_a_path_that_is_none_is_one_line(path):
    with pytest.raises(UserError, match=r"config file|address of a storage") as raised:
        load_config(path)
    one_line(raised.value)


@pytest.mark.parametrize(
    "raw", [{"seed": 10**5000}, {("a", 1): 1}, {"data": {"root": "a\0b"}}, {"run": {"name": "a\n"}}]
)
def test_settings_from_python_are_refused_in_one_line(raw):
    with pytest.raises(UserError) as raised:
        parse_config(raw)
    one_line(raised.value)


VALUES = [
    *("0", "1", "-1", "2", "0.5", "1e-3", "1.0e+400", "-.inf", ".nan", "9" * 400, "0x1F", "1_000", "010", "1:30"),
    *("true", "no", "null", "~", "''", "x", "é", "digits", "adamw", "2020-01-01", LONG, '"\\0"', '"\\uDFFF"', "'a: b'"),
    *("[]", "[1, 2]", "[1, 1, 2, 4, 4]", "[[1]]", "[null]", "{}", "{a: 1}", "{1: 2}", "[0.1, 0.2]", "&a [1]", "*a"),
    *("!!int 3", "!!binary eA==", "!x y", "<<", "=", "%", "- 1", "|", "> x", "@", "`", "\t", "{", "]", "\\", '"'),
]


def test_no_random_config_gives_a_traceback(tmp_path):
    """Each of 400 is a config, which survives its own YAML, or is refused in one line."""
    draw = random.Random(0)
    keys, taken = (
        [*known_keys(), "wml", "data", "x", "wml.x", "model.sharing.0", "pruning.ratios.9", "", ".", "a.b.c"],
        0,
    )
    path = tmp_path / "config.yaml"
    for _ in range(400):
        lines = [
            f"{draw.choice(keys).replace('.', ': {', 1)}: {draw.choice(VALUES)}" for _ in range(draw.randint(0, 2))
        ]
        path.write_text("\n".join(line + "}" * line.count(": {") * draw.choice((1, 1, 1, 0)) for line in lines))
        overrides = [f"{draw.choice(keys)}={draw.choice(VALUES)}" for _ in range(draw.randint(0, 2))]
        try:
            config = load_config(path, overrides)
        except UserError as error:
            one_line(error)
            continue
        taken += 1
        path.write_text(config.to_yaml())
        assert load_config(path) == config
        assert isinstance(config, Config)
        assert config.run_id.isprintable()
    assert 40 < taken < 360
