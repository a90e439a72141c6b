"""Config files and overrides that are wrong in every way give one line, never a traceback."""

import pytest

from wml_ray.config.load import known_keys, load_config, parse_config
from wml_ray.errors import UserError
from wml_ray.networks.backbones import build_stages
from wml_ray.networks.spec import ImageSpec
from wml_ray.search.settings import SearchConfig

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
        (f"seed: {'9' * 5000}\n", "'seed': not a valid number: 999"),
        ("seed: 0x_\n", "'seed': not a valid number: 0x_ (line 1)"),
        (f"seed: {'9' * 4000}\n", "seed = 9999999999"),
        ("data: {batch_size: 1.0e+400}\n", "data.batch_size = inf"),
        ("optim: {learning_rate: 1.0e+400}\n", "optim.learning_rate = inf"),
        (f"wml: {'[' * 5000}{']' * 5000}\n", "nested deeper than 10 levels"),
        (f"optim: {'{a: ' * 5000}", "nested deeper than 10 levels"),
        (BOMB, "'b.0': aliases such as *name are not supported (line 2)"),
        ("data: &a [*a]\n", "'data.0': aliases such as *name are not supported"),
        ('data: {root: "a\\0b"}\n', "'data.root': control character in"),
        ('"wml\\n": 1\n', "control character in"),
        ('data: {root: "\\ud800"}\n', "control character in"),
        ("seed: !!python/object/apply:os.getcwd []\n", "'seed': tags such as !!int are not supported"),
        ("seed: !!timestamp soon\n", "tags such as !!int are not supported"),
        (f"{LONG * 101}: 1", "FILE is not valid YAML: it has more than 100,000 characters"),
        (f"model: {{sharing: [{'1, ' * 999}1]}}\n", "model.sharing = [1, 1, 1"),
        ("model: {sharing: [1000, 1000]}\n", "model.sharing.0 = 1000: input should be less than or equal to 64"),
        ("model: {backbone: 'a/b:../c'}\n", "model.backbone = 'a/b:../c'"),
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


def is_numeric(field):
    """Whether a number is a value of this field."""
    return any(kind in str(field.annotation) for kind in ("int", "float"))


@pytest.mark.parametrize("key", [key for key, field in known_keys().items() if is_numeric(field)])
@pytest.mark.parametrize("value", ["1.0e+300", "1" + "0" * 40, "-1.0e+300", ".inf", "-.inf", ".nan"])
def test_every_number_has_finite_bounds(refused, key, value):
    default = known_keys()[key].default
    lists = [f"[{value}]", f"[1, {value}]"] if isinstance(default, tuple) else [value]
    for text in lists:
        message = refused("", f"{key}={text}")
        assert message.startswith(key), message


@pytest.mark.parametrize("setting", ["trials", "seed", "grace_epochs", "reduction_factor", "concurrent"])
@pytest.mark.parametrize("value", [10**400, -1, float("inf"), float("nan")])
def test_every_number_of_a_search_has_finite_bounds(setting, value):
    with pytest.raises(UserError, match=f"^{setting} = "):
        SearchConfig(**{"study": "s", "trials": 1, setting: value})


@pytest.mark.parametrize("name", ["os:system", "os:nothing", "antigravity.nowhere:x", "raises:stages", "exits:stages"])
def test_a_backbone_that_is_none_is_one_line(empty_workplace, monkeypatch, name):
    (empty_workplace / "raises.py").write_text("def stages(spec):\n    raise KeyError('a\\nb')")
    (empty_workplace / "exits.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(empty_workplace)
    with pytest.raises(UserError, match=f"^model.backbone = '{name}'") as raised:
        build_stages(name, ImageSpec(1, 8, 10))
    one_line(raised.value)


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
