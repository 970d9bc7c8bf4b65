"""Recipes that nobody meant well: refused in a moment, before anything is built."""

import contextlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrormask.train import Recipe, load, plain_yaml, recipe_file

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LAUGHS, r"has the alias \*a0 \(line 2\); write the value out"),
        ("method: {name: mirror, options: {a: &x [1], b: *x}}", r"has the alias \*x"),
        ("method: &m {name: mirror, options: *m}", r"has the alias \*m"),
        ("method: {options: '{a: &x [1, 1], b: [*x, *x]}'}", r"has the alias \*x"),
        ("epochs: " + "[" * 20_000, "nested more than 30 deep"),
        ("epochs: '" + "[" * 5_000 + "'", "nested more than 30 deep"),
        ("epochs:" + "".join(f"\n{' ' * i}a:" for i in range(1, 200)), "nested more than 30 deep"),
        ("x: [" + "1," * 30_000 + "]", "more than 20,000 values"),
        ("#" * 250_001, "has 250,001 characters"),
        ("\n" * 250_000, "holds a NoneType"),
        (" " * 249_999 + "a", "holds a str"),
        ('out: "a\\0b"', r"the control character '\\x00' in 'a"),
        ('data: {name: "folder:\\e[2J"}', r"the control character '\\x1b' in"),
        ("threads: 99999999999999999999", "threads is above 4,096"),
        ("threads: 5000", "threads is above 4,096"),
        ("seed: 18446744073709551616", "seed is above"),
        ("batch_size: 9223372036854775807", "batch_size is above 2,147,483,647"),
        ("log_every: 18446744073709551616", "log_every is above"),
        ("data: {crop: 1000000000}", "data.crop is above 1,024"),
        ("epochs: " + "9" * 5_000, "a value of 5,000 characters"),
        ("epochs: " + ":".join(["1"] * 4_000), "a value of 7,999 characters"),
        ("out: " + "x" * 20_000, "a value of 20,000 characters"),
        ("epochs: 3\nsparsity: 0.5\nepochs: 4", r"has the key 'epochs' twice \(line 3\)"),
        ("model: {name: mlp, options: {hidden: 3, hidden: 4}}", "has the key 'hidden' twice"),
        ("? [1]\n: 2", "a key that is no plain value"),
        ("epochs: !!python/object/apply:os.system ['true']", "is not YAML: could not determine a constructor"),
        ("epochs: 2020-99-99", "month must be in"),
        ("1: 2", "1 is a int, not a name"),
        ("a: *nothing", "stands for nothing"),
        ("\x00", "is not YAML"),
        ("- 1", "holds a list"),
    ],
    ids=range(31),
)
def test_what_would_take_long_is_refused_at_once(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    start = time.process_time()
    with pytest.raises(ValueError, match=message):
        load(path)
    assert time.process_time() - start < 1


def test_an_argument_may_not_hide_it_either():
    with pytest.raises(ValueError, match=r"an option has the alias \*x"):
        recipe_file.parse({}, ["--method.options={a: &x [1], b: *x}"])


def test_what_is_no_file_is_not_opened(tmp_path):
    with pytest.raises(ValueError, match="it is not a file"):
        load(tmp_path)
    (tmp_path / "big.yaml").write_bytes(b" " * 5_000_000)
    with pytest.raises(ValueError, match="5,000,000 bytes"):
        load(tmp_path / "big.yaml")


def test_texts_with_stars_and_ampersands_stay_texts(tmp_path):
    (tmp_path / "r.yaml").write_text("out: 'runs/*a & b [c'\ndata: {root: '*x'}")
    assert load(tmp_path / "r.yaml").out == "runs/*a & b [c"


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from([*Recipe().identity(), "method", "out", "name", "options"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUES | st.dictionaries(KEYS, VALUES, max_size=3), max_size=4))
def test_any_tree_gives_a_recipe_or_an_error_of_the_users(tree):
    with contextlib.suppress(TypeError, ValueError):
        assert isinstance(recipe_file.from_dict(tree), Recipe)


@settings(max_examples=400, deadline=None)
@given(st.text(alphabet="ab:&*[]{}-\n '\"!?,#1.<>|~", max_size=60) | st.text(max_size=40))
def test_any_text_gives_a_value_or_a_value_error(text):
    with contextlib.suppress(ValueError):
        plain_yaml.load(text, "it")
