"""`cpjax checkpoint` and `cpjax generate`, as a user runs them."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from typer.testing import CliRunner

from cpjax.cli import app
from cpjax.deepseek import simulate
from cpjax.deepseek.checkpoint import write_random
from cpjax.deepseek.config import SMALL
from cpjax.deepseek.draft import Drafted
from cpjax.deepseek.generate import Generated
from cpjax.deepseek.one_device import Checked
from cpjax.deepseek.tokenizer import open_tokenizer

pytestmark = pytest.mark.usefixtures("float64")

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "deepseek-r1-cp2.json"


def run(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


def refused(*arguments):
    """The one line of a user error."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result
    lines = [line for line in result.stderr.splitlines() if line.startswith("cpjax: ")]
    return lines[-1]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With fewer layers and experts than the command's own, which compile longer."""
    folder = tmp_path_factory.mktemp("commands") / "model"
    write_random(folder.with_name("like"), replace(SMALL, num_hidden_layers=2, n_routed_experts=8), seed=0)
    result = run("checkpoint", folder, "--seed", 1, "--like", folder.with_name("like"))
    assert result.exit_code == 0, result.output
    assert f"Next: cpjax generate {folder} --prompt-ids" in result.stdout
    return folder


def test_a_checkpoint_is_written_once(model, tmp_path):
    assert "nothing is overwritten" in refused("checkpoint", model)
    result = run("checkpoint", tmp_path / "new", "--dtype", "bfloat16", "--json")
    said = json.loads(result.stdout)
    assert (said["tensors"], said["dtype"], said["seed"]) == (205, "bfloat16", 0)
    assert said["bytes"] == sum((tmp_path / "new" / name).stat().st_size for name in said["files"])
    assert "config.json is not there" in refused("checkpoint", tmp_path / "x", "--like", tmp_path)


def deployment(folder, **changes):
    """The example's prefill and decode configs, for 4 cards and for 2: cp 2, tp 2 and sp 2 here, tp 2 there."""
    small = {
        "prefill-cp2": {"worldSize": 4, "tp": 2, "sp": 2, "moe_ep": 4},
        "decode": {"worldSize": 2, "dp": 1, "tp": 2, "moe_ep": 2},
    }
    paths = []
    for name, sizes in small.items():
        config = json.loads((EXAMPLE.parent / f"{name}.json").read_text())
        config["BackendConfig"]["npuDeviceIds"] = [[*range(sizes["worldSize"])]]
        model = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
        model |= sizes | changes.get(name.split("-")[0], {})
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(json.dumps(config))
    return paths


@pytest.mark.slow
def test_a_disaggregated_deployment(model, tmp_path):
    """The decode instance is on two devices behind those of the prefill, and drafts as the configs say."""
    prefill, decode = deployment(tmp_path)
    words = ("generate", model, "--prompt-ids", "5,6,7,8,9", "--steps", "3", "--config", prefill)
    result = run(*words, "--decode-config", decode, "--block", "2", "--check", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert (said["cp"], said["tp"], said["sp"], said["last block"]) == (2, 2, True, "mindie")
    assert said["check"]["passed"]
    latents = 5 * 8 * (32 + 8)  # of 5 tokens in float64, in a layer
    assert said["decode instance"] == {"tp": 2, "bytes a rank": (2 + 1) * latents}, "of two layers and a module"
    assert said["draft"]["tokens a step"] == 1
    assert said["draft"]["drafted"] == 2 - said["draft"]["accepted"]


def test_what_a_deployment_decides(tmp_path):
    """Of the examples: scaled down to heads that 4 divides; of MindIE-Motor's file, which has both parts."""
    prefill, decode = EXAMPLE.with_name("prefill-cp2.json"), EXAMPLE.with_name("decode.json")
    found = simulate.chosen(None, None, prefill, SMALL, decode=decode)
    assert found[:-1] == ((2, 4), True, 1, 1)
    assert found.remarks == (
        "scaled down: tp 4 instead of the deployment's 8, sp 4 with it; cp 2 as it is",
        "scaled down: one of the decode node's 16 groups of dp is computed",
    )
    assert simulate.chosen(None, None, prefill, SMALL) == found._replace(decode_tp=None, remarks=found.remarks[:1])
    assert simulate.chosen(None, None, EXAMPLE, SMALL)[:-1] == ((2, 4), True, 0, None), "it has no MTP"
    assert simulate.chosen(None, None, None, SMALL, decode_tp=3) == ((2, 1), False, 0, 3, ())
    both = simulate.deployed(*deployment(tmp_path), SMALL)
    assert both == ((2, 2), True, 1, 2, ())
    parts = [json.loads(path.read_text()) for path in deployment(tmp_path)]
    names = ("mindie_server_prefill_config", "mindie_server_decode_config")
    pods = {"p_instances_num": 1, "d_instances_num": 1, "single_p_instance_pod_num": 1, "single_d_instance_pod_num": 1}
    motor = {"deploy_config": pods | {"p_pod_npu_num": 4, "d_pod_npu_num": 2}, **dict(zip(names, parts, strict=True))}
    (tmp_path / "user_config.json").write_text(json.dumps(motor))
    assert simulate.chosen(None, None, tmp_path / "user_config.json", SMALL)[:-1] == both[:-1]


def test_two_configs_that_do_not_fit(model, tmp_path):
    words = ("generate", model, "--prompt-ids", "1")
    prefill, decode = deployment(tmp_path, decode={"plugin_params": ""})
    said = refused(*words, "--config", prefill, "--decode-config", decode)
    assert "decode.json: MindIE does not take this config: pair-both-mtp (MTP 1 and no MTP" in said
    assert "give the prefill one first" in refused(*words, "--config", decode, "--decode-config", prefill)
    assert "give the prefill node's as --config" in refused(*words, "--decode-config", decode)
    pair = ("--config", prefill.with_name("prefill-cp2.json"), "--decode-config", deployment(tmp_path)[1])
    assert "leave out --decode-tp, or that config" in refused(*words, *pair, "--decode-tp", 2)
    assert "cp·tp and the decode instance's 63 is 65; at most 64" in refused(*words, "--decode-tp", 63)


def test_several_prompts(model, monkeypatch):
    """What is printed of them."""
    seconds = {"prefill": 1.0, "first step": 1.0, "further steps": 1.0}
    found = Generated(np.array([[7, 8, 9], [1, 2, 3]]), np.zeros((2, 3, 10)), seconds, Drafted(1, 2, ((1, 0), (1,))))
    prompts = ("--prompt-ids", "5,6,7,8,9", "--prompt-ids", "11,12,13")
    words = ("generate", model, *prompts, "--draft", "1", "--cached")
    assert "there are 2 prompts, and cached is [1]; give one number a prompt" in refused(*words, "1")
    assert "give 0 to all but one for each" in refused(*words, "0,3")
    monkeypatch.setattr(simulate, "run", lambda request, advance: simulate.Said(request, "float64", found, None))
    text = run(*words, "0,2").stdout
    assert text.startswith("tokens of request 0: 7, 8, 9\ntokens of request 1: 1, 2, 3\n")
    assert "prefill of 8 tokens of 2 requests in one row, 2 of them cached before, 1.0 s" in text
    assert "2 of 3 accepted, 2 steps" in text


def byte_tokenizer(folder, **settings):
    """A tokenizer whose tokens are bytes, with a begin token 256; and the settings beside it."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)} | {"<begin>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<begin>"])
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


@pytest.mark.slow
def test_a_prompt_as_text(model, tmp_path):
    """The ids are those of the tokenizer, with the begin token once; the result is text, too."""
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    tokenizer = byte_tokenizer(folder, add_bos_token=True, bos_token={"content": "<begin>"})
    words = ("generate", folder, "--cp", "1", "--steps", "3")
    result = run(*words, "--text", "née", "--json")
    assert result.exit_code == 0, result.output
    (said,) = json.loads(result.stdout)["requests"]
    assert said["prompt"] == [256, *tokenizer.encode("née").ids]
    assert len(said["prompt"]) == 5  # é has two bytes
    assert said["text"] == tokenizer.decode(said["tokens"])
    ids = ",".join(map(str, said["prompt"]))
    (by_ids,) = json.loads(run(*words, "--prompt-ids", ids, "--json").stdout)["requests"]
    assert (by_ids["tokens"], by_ids["text"]) == (said["tokens"], None)
    assert f"text: {said['text']!r}" in run(*words, "--text", "née").stdout


def test_the_begin_token_is_there_once(tmp_path):
    tokenizer = byte_tokenizer(tmp_path, add_bos_token=True, bos_token="<begin>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 256)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(tmp_path).encode("ab") == (256, *tokenizer.encode("ab", add_special_tokens=False).ids)
    assert open_tokenizer(tmp_path).encode("") == (256,)
    byte_tokenizer(tmp_path, add_bos_token=False, bos_token="<begin>")
    assert open_tokenizer(tmp_path).encode("ab") == tuple(tokenizer.encode("ab", add_special_tokens=False).ids)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", "is no tokenizer"),
        ("tokenizer.json", None, "is not there, so that no text can be read"),
        ("tokenizer_config.json", "[1", "is not JSON"),
        ("tokenizer_config.json", "[1]", "holds a JSON list; it must be an object"),
        ("tokenizer_config.json", '{"add_bos_token": true, "bos_token": "<s>"}', "'<s>' is none of the vocabulary's"),
        ("tokenizer_config.json", '{"add_bos_token": true}', "None is none of the vocabulary's"),
    ],
)
def test_a_damaged_tokenizer(model, tmp_path, name, content, message):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    byte_tokenizer(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    assert message in refused("generate", folder, "--text", "a")


def test_a_prompt_is_given_once(model, tmp_path):
    assert "give the prompts once" in refused("generate", model)
    assert "give the prompts once" in refused("generate", model, "--text", "a", "--prompt-ids", "1")
    byte_tokenizer(tmp_path)
    assert "the text '' has no token" in refused("generate", tmp_path, "--text", "")


@pytest.mark.process
def test_from_nothing_to_tokens(tmp_path):
    """Both commands in processes of their own, under the vendor's example deployment: two prompts in one row."""
    command = [sys.executable, "-m", "cpjax"]
    how = {"cwd": tmp_path, "capture_output": True, "text": True, "check": False}
    how["env"] = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiled in half the time
    written = subprocess.run([*command, "checkpoint", "m"], **how)
    assert written.returncode == 0, written.stderr
    line = [*command, "generate", "m", "--prompt-ids", "5,6,7,8,9", "--prompt-ids", "11,12,13", "--cached", "0,2"]
    line += ["--config", EXAMPLE, "--check", "--json", "--chunk", "3", "--draft", "1"]
    done = subprocess.run(line, **how)
    assert done.returncode == 0, done.stderr
    assert "scaled down: tp 4 instead of the deployment's 8, sp 4 with it; cp 2 as it is" in done.stderr
    said = json.loads(done.stdout)
    assert (said["cp"], said["tp"], said["sp"], said["block"], said["last block"]) == (2, 4, True, 128, "mindie")
    requests = [(one["prompt"], one["cached"], len(one["tokens"])) for one in said["requests"]]
    assert requests == [([5, 6, 7, 8, 9], 0, 8), ([11, 12, 13], 2, 8)]
    drafts = said["draft"]
    assert (drafts["tokens a step"], drafts["border"]) == (1, "exact")
    assert drafts["drafted"] == 2 * 7 - drafts["accepted"]
    assert said["check"]["passed"]
    assert said["check"]["largest difference of a logit"] < 1e-10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt-ids", "1,x"), "--prompt-ids '1,x' must be whole numbers with commas"),
        (("--prompt-ids", "1,512"), "token id 512 is none of the model's; they are 0 to 511"),
        (("--prompt-ids", "1", "--cp", "65"), "cp·tp is 65; at most 64 devices are simulated"),
        (("--prompt-ids", "1", "--tp", "3"), "num_attention_heads is 4, which tp 3 does not divide"),
        (("--prompt-ids", "1", "--cp", "2", "--config", EXAMPLE), "leave out --cp, --tp and --sp, or --config"),
        (("--prompt-ids", "1", "--sp", "--config", EXAMPLE), "leave out --cp, --tp and --sp, or --config"),
        (("--prompt-ids", "1", "--sp"), "give --tp of at least 2 with it"),
        (("--prompt-ids", "1", "--last-block", "first"), "--last-block is 'first'; it must be turn or mindie"),
        (("--prompt-ids", "1", "--border", "lossy"), "border is 'lossy'; it must be exact or vendor"),
        (("--prompt-ids", "1", "--config", ROOT / "README.md"), "README.md"),
        (("--prompt-ids", "1", "--dtype", "float32", "--check"), "--check is made in float64; leave out --dtype"),
        (("--prompt-ids", "1", "--precision", "float32", "--check"), "none of precision float32; leave out --check"),
        (("--prompt-ids", "1", "--dtype", "float16"), "dtype 'float16' is not one that a model is computed in"),
        (("--prompt-ids", "1", "--exchange", "all_to_all"), "a latent takes one of ring"),
    ],
)
def test_bad_input(model, arguments, message):
    assert message in refused("generate", model, *arguments)


@pytest.mark.slow
def test_attention_in_fp16_is_checked(model, monkeypatch):
    """Logits within what drawn roundings explain; of a failure, whether experts may be the reason."""
    words = ("generate", model, "--prompt-ids", "5,6,7", "--cp", "2", "--steps", "2", "--precision", "flash_fp16")
    result = run(*words, "--check", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["check"]
    assert said["in"] == "standard deviations of its rounding"
    assert 0.5 < said["largest difference of a logit"] < said["allowed"]
    real = simulate.check
    monkeypatch.setattr(simulate, "check", lambda *of, **more: real(*of, **more)._replace(difference=99.0))
    for draws, word in ((0, "DIFFERS from one device"), (2, "cannot tell whether it agrees")):
        monkeypatch.setattr(simulate, "count_other_experts", lambda *of, times, draws=draws: draws * (times > 1))
        failed = run(*words, "--check")
        assert failed.exit_code == 1
        assert f"check: {word}" in failed.stdout
        assert f"reason: {simulate.reason_of_experts(0, draws)}" in failed.stdout


def test_no_checkpoint(tmp_path):
    assert "is no folder; give a checkpoint's, or write one: cpjax checkpoint DIR" in refused(
        "generate", tmp_path / "nowhere", "--prompt-ids", "1"
    )


@pytest.mark.parametrize(
    ("checked", "code", "word"),
    [
        (Checked(1e-15, 1e-10, None), 0, "agrees with one device"),
        (Checked(1e-3, 1e-10, None), 1, "DIFFERS from one device"),
        (Checked(1e-15, 1e-10, 3), 1, "another token at step 3"),
        (Checked(float("nan"), float("nan"), None), 1, "DIFFERS from one device"),
        (Checked(4.0, 9.0, 3, is_in_sigma=True), 0, "at most 4.0 standard deviations of their rounding (9.0 allowed)"),
        (Checked(4.0, 9.0, 3, is_in_sigma=True), 0, "another token at step 3, within rounding"),
        (Checked(9.1, 9.0, None, is_in_sigma=True), 1, "DIFFERS from one device"),
        (None, 0, "tokens: 7, 8, 9"),
    ],
)
def test_a_check_that_fails_ends_with_1(model, monkeypatch, checked, code, word):
    """What is printed of a result, in words and as JSON without NaN."""
    found = Generated(
        np.array([[7, 8, 9]]), np.zeros((1, 3, 10)), {"prefill": 1.0, "first step": 1.0, "further steps": 1.0}
    )
    monkeypatch.setattr(simulate, "run", lambda request, advance: simulate.Said(request, "float64", found, checked))
    result = run("generate", model, "--prompt-ids", "1", "--check")
    assert result.exit_code == code
    assert word in result.stdout
    result = run("generate", model, "--prompt-ids", "1", "--json")
    assert result.exit_code == code
    said = json.loads(result.stdout)
    assert said["requests"] == [{"prompt": [1], "cached": 0, "tokens": [7, 8, 9], "text": None}]
    assert (said["check"] is None) == (checked is None)
