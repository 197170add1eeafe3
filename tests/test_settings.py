"""Settings: precedence, one-line errors that name source, field, rule and remedy, documentation."""

import json
import re
from pathlib import Path

import pytest
import tomli_w

from truestep import ConfigError, GPTConfig, RunConfig, TrainingConfig
from truestep.cli import main
from truestep.config import resolve
from truestep.settings import settings
from truestep.workflows.history import difference


def test_command_line_beats_environment_beats_file_beats_base_beats_default(tmp_path):
    file = tmp_path / "train.toml"
    base = {"training": {"learning_rate": 1.0, "weight_decay": 1.0, "eps": 1.0, "num_steps": 11}}
    file.write_text("[training]\nlearning_rate = 2.0\nweight_decay = 2.0\neps = 2.0\n")
    environ = {
        "TRUESTEP_TRAINING__LEARNING_RATE": "3.0",
        "TRUESTEP_TRAINING__WEIGHT_DECAY": "3.0",
        "HOME": "/",
    }
    explicit = {"training": {"learning_rate": 4.0}}
    training = resolve(explicit, environ, file, base).training
    assert (training.learning_rate, training.weight_decay, training.eps) == (4.0, 3.0, 2.0)
    assert (training.num_steps, training.seed) == (11, 0)


def test_environment_values_are_read_as_toml_would(tmp_path):
    environ = {
        "TRUESTEP_TRAINING__BETAS": "[0.8, 0.9]",
        "TRUESTEP_TRAINING__MAX_GRAD_NORM": "off",
        "TRUESTEP_MODEL__QK_NORM": "true",
        "TRUESTEP_DATA__SOURCE": "my text.txt",
        "TRUESTEP_RUN__NAME": "7",
        "TRUESTEP_RUN__SAMPLE_PROMPT": "true # x",
    }
    config = resolve({}, environ)
    assert config.training.betas == (0.8, 0.9)
    assert config.training.max_grad_norm == "off"
    assert config.model.qk_norm is True
    assert config.data.source == "my text.txt"
    assert (config.run.name, config.run.sample_prompt) == ("7", "true # x")


def test_the_resolved_config_survives_toml_and_json(tmp_path):
    config = resolve({"training": {"max_grad_norm": "off"}, "model": {"width": 64}}, {})
    toml, as_json = tmp_path / "a.toml", tmp_path / "a.json"
    toml.write_text(tomli_w.dumps(config.model_dump(mode="json")))
    as_json.write_text(config.model_dump_json())
    assert resolve({}, {}, toml) == config == resolve({}, {}, as_json)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": -1}, ["learning_rate=-1", "greater than 0", "0.0003"]),
        ({"learning_rate": float("nan")}, ["learning_rate=NaN", "finite"]),
        ({"betas": (0.9, 1.0)}, ["betas=[0.9, 1.0]", "less than 1"]),
        ({"betas": (-0.1, 0.9)}, ["betas", "greater than or equal to 0"]),
        ({"num_steps": 0}, ["num_steps=0", "greater than 0"]),
        ({"max_grad_norm": 0}, ["max_grad_norm=0", "'off'"]),
        ({"warmup_steps": 11, "num_steps": 10}, ["warmup_steps=11", "num_steps=10", "shorter"]),
        (
            {"schedule": "wsd", "decay_steps": 8, "warmup_steps": 3, "num_steps": 10},
            ["decay_steps=8", "warmup_steps=3", "num_steps=10"],
        ),
        ({"num_steps": True}, ["num_steps=true", "must be int"]),
        ({"max_grad_norm": False}, ["max_grad_norm=false"]),
        ({"optimizer": "sgd"}, ["optimizer=sgd", "'adamw' or 'muon'"]),
        ({"lerning_rate": 1}, ["lerning_rate is not a setting", "learning_rate"]),
        ({"precision": "a\nb\x1b[31m"}, ["precision=a\\nb\\x1b"]),
    ],
)
def test_a_wrong_value_is_one_line_with_field_value_rule_and_remedy(values, words):
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**values)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 100, "num_heads": 3}, ["width=100", "multiple of 6"]),
        ({"num_heads": 4, "num_kv_heads": 3}, ["num_kv_heads=3", "num_heads=4"]),
        ({"dropout": 1.0}, ["dropout=1.0", "less than 1"]),
        ({"context_length": 0}, ["context_length=0"]),
    ],
)
def test_a_model_that_cannot_be_built_is_refused(values, words):
    with pytest.raises(ConfigError) as caught:
        GPTConfig(**values)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[training]\nlearning_rat = 1\n", ["bad.toml", "training.learning_rat", "learning_rate"]),
        ("[trainin]\nlearning_rate = 1\n", ["bad.toml", "trainin", "did you mean training"]),
        ("[data]\nbatch_size = -2\n", ["bad.toml", "data.batch_size=-2", "greater than 0"]),
        ("training = 3\n", ["bad.toml", "training=3", "[training]"]),
        ("[training\n", ["bad.toml", "not valid TOML"]),
        ("\x00", ["bad.toml", "not valid TOML"]),
    ],
)
def test_an_error_in_a_file_names_the_file_and_the_nearest_key(tmp_path, text, words):
    file = tmp_path / "bad.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve({}, {}, file)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_file_that_is_missing_or_of_another_kind_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        resolve({}, {}, tmp_path / "none.toml")
    with pytest.raises(ConfigError, match=r"neither \.toml nor \.json"):
        resolve({}, {}, tmp_path / "train.yaml")
    nested = tmp_path / "deep.json"
    nested.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="not valid JSON"):
        resolve({}, {}, nested)


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("TRUESTEP_LEARNING_RATE", "TRUESTEP_TRAINING__LEARNING_RATE"),
        ("TRUESTEP_TRAINING_LEARNING_RATE", "TRUESTEP_TRAINING__LEARNING_RATE"),
        ("TRUESTEP_DATA__BATCHSIZE", "TRUESTEP_DATA__BATCH_SIZE"),
    ],
)
def test_a_misspelt_variable_is_refused_with_the_nearest(variable, nearest):
    with pytest.raises(ConfigError, match=f"{variable} names no setting; did you mean {nearest}"):
        resolve({}, {variable: "1"})


def test_several_problems_are_all_said_a_line_each():
    with pytest.raises(ConfigError) as caught:
        resolve({"training": {"learning_rate": -1}, "data": {"batch_size": 0}}, {})
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("command line: ") for line in lines)


def test_settings_are_immutable():
    with pytest.raises(ValueError, match="frozen"):
        TrainingConfig().learning_rate = 1.0


def test_every_setting_is_classified_and_documented():
    listed = list(settings(RunConfig))
    assert len(listed) > 40
    for setting in listed:
        assert len(setting.meaning) > 15, setting.name
        assert setting.meaning[-1] == ".", setting.name


def test_the_difference_of_two_configs_is_listed_by_name():
    old = RunConfig()
    new = resolve({"training": {"seed": 3}, "run": {"log_every": 7}}, {})
    found = {s.name: (a, b, s.kept_on_resume) for s, a, b in difference(old, new)}
    assert found == {"training.seed": (0, 3, True), "run.log_every": (10, 7, False)}


def test_there_is_a_json_schema_of_every_setting():
    schema = RunConfig.model_json_schema()
    text = json.dumps(schema)
    for setting in settings(RunConfig):
        assert f'"{setting.name.split(".")[-1]}"' in text
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model]\nwidth = 33", "x.toml: model.width=33 does not give num_heads"),
        ("[training]\nnum_steps = true", "x.toml: training.num_steps=true is true"),
        (
            "[training]\nbetas = [0.9]",
            "x.toml: training.betas=[0.9] must be 2 numbers; the default",
        ),
    ],
)
def test_an_error_names_the_setting_and_where_it_stands(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    Path("x.toml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        resolve({}, {}, Path("x.toml"))


def test_an_empty_list_is_no_settings(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(ConfigError, match=re.escape('no table of settings; write {"section": {}}')):
        resolve({}, {}, tmp_path / "x.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--training.betas 0.9", "--training.betas takes 2 values, and 1 was given: 0.9"),
        ("--model.qk-norm True", "True is not understood: true and false are written"),
        ("--data a --data.source b", "--data=a and --data.source=b name two texts"),
        ("--data no.txt", "docstrings; looked for in '"),
    ],
)
def test_the_command_line_is_answered_in_its_own_words(
    tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Path("x.toml").touch()
    assert main(["train", "x.toml", *arguments.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_rule_between_settings_blames_the_last_of_their_sources(tmp_path):
    (tmp_path / "x.toml").write_text("[model]\nwidth = 64")
    with pytest.raises(ConfigError, match=r"command line: model\.width=64 does not give num_heads"):
        resolve({"model": {"num_heads": 3}}, {}, tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("variable", "near"),
    [("SEED", "TRAINING__SEED"), ("BATCH_SIZE", "DATA__BATCH_SIZE"), ("MODEL__WIDHT", "MODEL__W")],
)
def test_a_variable_without_its_section_is_answered_with_it(variable, near):
    with pytest.raises(ConfigError, match=f"did you mean TRUESTEP_{near}"):
        resolve({}, {f"TRUESTEP_{variable}": "3"})


def test_no_setting_is_proposed_for_a_variable_like_none(monkeypatch):
    with pytest.raises(ConfigError, match="TRUESTEP_FOO names no setting; see `truestep train"):
        resolve({}, {"TRUESTEP_FOO": "3"})
