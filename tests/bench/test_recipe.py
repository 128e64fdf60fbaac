"""Recipes: TOML and flags mean the same, and every mistake is told at once with its path."""

import json

import pytest

from gradwise.bench.recipe import Recipe, from_flags, parse, read
from gradwise.core.errors import UserError
from gradwise.core.search_space import Choice, LogUniform, Uniform

GOOD = """
task = "digits"
seeds = [0, 7]
trials = 4
budget = {forwards = 600}
baseline = "plain"

[methods.noisy]
optimizer = {name = "sgd", momentum = 0.9}
loss = {name = "comp_sum", tau = 1.5}
transforms = [{name = "clip_norm", max_norm = 1.0}, "gradient_noise"]
schedule = "linear_decay"
[methods.noisy.search_space]
lr = {low = 1e-3, high = 1.0, log = true}
"gradient_noise.eta" = {values = [0.01, 0.3]}
weight_decay = {low = 0, high = 0.1}

[methods.plain]
optimizer = "adamw"

[methods.blind]
optimizer = "sgd"
estimator = {name = "spsa", q = 4}
parametrization = "weight_norm"
"""


def toml(tmp_path, text) -> Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return read(path)


def test_a_recipe_means_what_it_says(tmp_path):
    recipe = toml(tmp_path, GOOD)
    assert (recipe.seeds, recipe.trials, recipe.baseline) == ((0, 7), 4, "plain")
    assert (recipe.budget.kind, recipe.budget.amount) == ("forwards", 600)
    noisy = recipe.methods["noisy"]
    assert noisy.space == {
        "lr": LogUniform(1e-3, 1.0), "gradient_noise.eta": Choice((0.01, 0.3)), "weight_decay": Uniform(0.0, 0.1),
        **{k: v for k, v in noisy.space.items() if k.startswith(("comp_sum.", "clip_norm."))},
    }  # fmt: skip
    assert "momentum" not in noisy.space
    assert noisy.sentence.strings()["transforms"] == "clip_norm(max_norm=1.0), gradient_noise"
    assert recipe.methods["blind"].sentence.strings()["estimator"] == "spsa(q=4)"


def test_flags_build_the_same_recipe(tmp_path):
    text = 'task = "wine"\nseeds = 3\ntrials = 2\nbudget = "steps=10"\n'
    text += '[methods.adamw]\noptimizer = "adamw"\n[methods.lion]\noptimizer = "lion"\n'
    from_file = toml(tmp_path, text)
    flags = from_flags(task="wine", methods="adamw,lion", seeds="3", trials=2, budget="steps=10")
    assert flags == from_file
    assert flags.plain() == from_file.plain()
    assert flags.baseline == "adamw"


def test_flags_take_the_place_of_the_files_keys(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(GOOD)
    assert from_flags(path, seeds="4,5,6").seeds == (4, 5, 6)
    assert from_flags(path, budget="seconds=0.5").budget.amount == 0.5
    with pytest.raises(UserError, match="--methods and --recipe both name the methods"):
        from_flags(path, methods="adamw,lion")


def test_its_plain_data_see_everything_that_decides_the_numbers():
    base = {"task": "wine", "methods": {"a": {"optimizer": "adamw"}, "b": {"optimizer": "sgd"}}}
    changes = [
        {"seeds": 6}, {"trials": 3}, {"budget": "steps=301"}, {"budget": "forwards=300"}, {"baseline": "b"}, {"task": "digits"},
        {"methods": {"a": {"optimizer": "adamw"}, "b": {"optimizer": {"name": "sgd", "nesterov": True}}}},
        {"methods": {"a": {"optimizer": "adamw"}, "b": {"optimizer": "sgd", "search_space": {"lr": {"low": 0.1, "high": 1}}}}},
    ]  # fmt: skip
    seen = {json.dumps(parse(base | change).plain()) for change in [{}, *changes]}
    assert len(seen) == len(changes) + 1


def test_every_mistake_is_told_at_once_with_its_path(tmp_path):
    text = """
task = "digitz"
sedes = 4
trials = "5"
budget = {stepz = 3}
baseline = "x"
[methods.a]
optimizer = {name = "sgd", momentum = "much", lrr = 3}
transforms = ["clip_nrom", 3]
[methods.b]
optimzer = "sgd"
[methods.c]
optimizer = "sgd"
transforms = [{name = "gradient_noise", eta = -1}]
search_space = {lr = {low = 3, high = 1}, "gradient_noise.gama" = {values = [1.0]}}
[methods.d]
optimizer = "sgd"
search_space = {mometum = {values = [0.1]}}
["methods"."e f"]
optimizer = "sgd"
"""
    with pytest.raises(UserError) as caught:
        toml(tmp_path, text)
    told = str(caught.value)
    for line in (
        "task: unknown task 'digitz'; did you mean 'digits'",
        "sedes: unknown key, did you mean 'seeds'?",
        "trials: expected a valid integer, got '5'",
        "budget: unknown budget 'stepz'; did you mean 'steps'?",
        "baseline: unknown method 'x'",
        "methods.a.optimizer: sgd: momentum must be float, got 'much'; unknown argument 'lrr', did you mean 'lr'?",
        "methods.a.transforms.0: unknown transform 'clip_nrom'; did you mean 'clip_norm'",
        "methods.a.transforms.1: expected a word such as",
        "methods.b.optimizer: required",
        "methods.b.optimzer: unknown key, did you mean 'optimizer'?",
        "methods.c.transforms.0: gradient_noise: eta must be finite and at least 0, got -1",
        "methods.c.search_space.lr: Uniform needs low < high",
        "methods.d.search_space.mometum: unknown knob 'mometum'; did you mean 'momentum'",
        "methods.e f: expected a name of letters, digits",
    ):
        assert line in told, line
    assert "mistakes in the recipe" in told


def two(method):
    return {"methods": {"a": method, "b": {"optimizer": "sgd"}}}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"seeds": 1}, "seeds: expected at least 2"),
        ({"seeds": True}, "seeds: expected a number of seeds"),
        ({"seeds": [1, 1]}, "seeds: expected a number of seeds or a list of at least two different integers"),
        ({"seeds": 2.0}, "seeds: expected a number"),
        ({"trials": 0}, "trials: expected greater than or equal to 1, got 0"),
        ({"trials": True}, "trials: expected a valid integer, got True"),
        ({"trials": 100_000}, "trials: expected less than or equal to 10000"),
        ({"budget": "steps=0"}, "budget: expected greater than 0"),
        ({"budget": {"steps": 1.5}}, "expected a whole number of steps, got 1.5"),
        ({"budget": {"steps": "9"}}, "expected a valid number, got '9'"),
        ({"budget": {"steps": float("nan")}}, "budget: expected"),
        ({"budget": {"steps": 1, "bytes": 2}}, "budget: expected one of steps, seconds, forwards or bytes"),
        ({"budget": "300"}, "budget: expected one of steps, seconds, forwards or bytes"),
        ({"task": 3}, "task: expected a valid string, got 3"),
        ({"methods": ["sgd"]}, "methods: expected at least 2, got 1"),
        ({"methods": ["sgd", "sgd"]}, "methods: sgd named twice"),
        ({"methods": {"a": 3, "b": {"optimizer": "sgd"}}}, "methods.a: expected a table, got 3"),
        (two({"optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9}}), "methods.a.search_space: nothing to tune"),
        (two({"optimizer": {"name": "sgd", "lr": 0.1}, "search_space": {"lr": {"values": [1.0]}}}), "'lr' has a value already"),
        (
            two({"optimizer": "sgd", "search_space": {"momentum": {"values": ["x"]}, "lr": {"low": -1.0, "high": 1.0}}}),
            "methods.a.search_space.momentum: sgd: momentum must be float, got 'x'\n"
            "  methods.a.search_space.lr: sgd: Invalid learning rate: -1.0",
        ),
        (two({"optimizer": "sgd", "search_space": {"lr": {"low": 0.1, "high": float("inf")}}}), "with finite numbers, got"),
    ],
)  # fmt: skip
def test_each_mistake_is_told(change, expected):
    with pytest.raises(UserError) as caught:
        parse({"task": "wine", "methods": ["adamw", "sgd"]} | change)
    assert expected in str(caught.value)


def test_mistakes_in_flags_are_told_by_their_flag():
    with pytest.raises(UserError) as caught:
        from_flags(task="digitz", methods="adamm,lion", seeds="1", budget="steps=x", trials=0, baseline="sgd")
    told = str(caught.value)
    for line in (
        "--task: unknown task 'digitz'", "--methods: unknown method 'adamm'; did you mean 'adam'", "--seeds: expected at least 2",
        "--budget: expected one of steps", "--trials: expected", "--baseline: unknown method 'sgd'",
    ):  # fmt: skip
        assert line in told, line
    with pytest.raises(UserError, match="--task and --methods are needed"):
        from_flags()


def test_a_file_that_is_not_toml_is_told_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"recipe.toml is not readable as TOML: .*line 2"):
        toml(tmp_path, "task = 'x'\nseeds = = 3\n")
    with pytest.raises(UserError, match="there is no file"):
        read(tmp_path / "none.toml")
