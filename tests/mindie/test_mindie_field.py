"""Files as people have them: each kind of file that was met in the field, accepted or refused with its cause first."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from mindie_build import CARDS, NZ, build, plugins

from cpjax.errors import InputError
from cpjax.mindie.check import Checked, check, check_files, setting_of
from cpjax.mindie.config import read_config
from cpjax.mindie.deployment import read_deployment
from cpjax.mindie.json_text import shown
from cpjax.mindie.layout import lay_out

EIGHT = {"Backend.npuDeviceIds": [CARDS[:8]], "Backend.multiNodesInferEnabled": True}
NO_SIZES: dict[str, Any] = dict.fromkeys(("dp", "cp", "sp", "tp", "moe_ep", "moe_tp"), ...)
TORCH = {"backendType": "torch", "modelName": "DeepSeek-V3.2_w8a8"}
ONE_CARD = {
    "Server.inferMode": "dmi", "Server.distDPServerEnabled": True, "Backend.npuDeviceIds": [[0]],
    "Schedule.distributedEnable": True, "worldSize": 1, "dp": 32, "cp": 1, "sp": 1, "tp": 1, "moe_ep": 32,
}  # fmt: skip
V3 = {"model_type": "deepseek_v3", "num_attention_heads": 128, "torch_dtype": "float16"}
QWEN = {"model_type": "qwen2", "num_attention_heads": 40, "torch_dtype": "float16", "quantize": "w8a8"}

REFUSED: dict[str, tuple[dict[str, Any], dict | None, str]] = {
    "a prompt longer than a prefill": ({"Schedule.maxPrefillTokens": 1024}, None, "prefill-tokens-hold-a-prompt"),
    "more to prefill than a batch": (
        {"Schedule.maxPrefillBatchSize": 9, "Schedule.maxBatchSize": 8}, None, "prefill-batch-within-batch",
    ),
    "two nodes without dp and tp": (NO_SIZES | EIGHT | {"worldSize": 8}, None, "dp-on-every-node"),
    "two nodes with dp 1": (EIGHT | {"worldSize": 8, "cp": 1, "sp": 1, "tp": -1}, None, "dp-on-every-node"),
    "worldSize of two nodes, the cards of one": (EIGHT, None, "cards-are-world"),
    "a label of R1 on a Qwen": ({}, QWEN, "model-supported"),
    "R1 that is not quantised": ({"modelName": "DeepSeek-R1"}, V3, "model-supported"),
    "R1 in FP8": ({}, V3 | {"quantization_config": {"quant_method": "fp8"}}, "model-supported"),
    "R1 W8A16": ({}, V3 | {"quantize": "w8a16"}, "model-supported"),
    "R1 in BF16": ({}, V3 | {"quantize": "w8a8_dynamic", "torch_dtype": "bfloat16"}, "fp16-only"),
    "R1 in BF16, as newer weights say it": (
        {}, {"model_type": "deepseek_v3", "quantize": "w8a8", "dtype": "bfloat16"}, "fp16-only",
    ),
    "V3.2 W4A8": (TORCH | {"sp": 1}, {"model_type": "deepseek_v32", "quantize": "w4a8_dynamic"}, "model-supported"),
    "torch without moe_tp": (TORCH | {"dp": 16, "cp": 1, "sp": 1, "tp": 1, "moe_tp": ...}, None, "torch-moe-product"),
    "torch with sp": ({"backendType": "torch"}, None, "torch-decode-without-sp"),
    "torch with cp and dp": (TORCH | {"sp": 1, "dp": 2, "tp": 4}, None, "torch-cp-without-dp"),
    "mtp without a number": (plugins("mtp"), None, "mtp-tokens-given"),
    "MTP in capitals": (plugins("MTP", 2), None, "plugin-types"),
    "a space behind a name": (plugins("mtp ,prefix_cache", 1) | NZ, None, "plugin-types"),
    "plugin_params without a type": ({"plugin_params": '{"num_speculative_tokens": 2}'}, None, "plugin-type-given"),
    "splitfuse with cp": (plugins("splitfuse") | {"Schedule.templateType": "Mix"}, None, "splitfuse-without-cp"),
    "an inferMode that does not exist": ({"Server.inferMode": "prefill"}, None, "infer-mode"),
    "one port for two": ({"Server.port": 1120}, None, "port-is-not-the-nodes"),
}  # fmt: skip

ACCEPTED: dict[str, tuple[dict[str, Any], dict | None, set[str]]] = {
    "a decode process of many": (ONE_CARD, None, {"role-known"}),
    "prefix cache with dp 2": (
        plugins("prefix_cache") | NZ | {"dp": 2, "cp": 1, "sp": 1, "moe_ep": 4, "moe_tp": 4}, None,
        {"prefix-cache-with-dp"},
    ),
    "a free name, R1's weights": ({"modelName": "deepseek"}, V3 | {"quantize": "w8a8_dynamic"}, {"model-known"}),
    "a free name, and a folder that says R1": (
        {"modelName": "chat", "modelWeightPath": "/data/DeepSeek-R1_w8a8"}, None, set(),
    ),
    "V3.1 W8A8": ({"modelName": "DeepSeek-V3.1_w8a8"}, None, {"v3-w8a8-disputed"}),
    "V3.2 on 32 cards": (TORCH | {"worldSize": 32, "cp": 32, "sp": 1, "tp": 1, "moe_ep": 32}, None, set()),
    "V3.2 W8A8 in BF16": (
        TORCH | {"sp": 1}, {"model_type": "deepseek_v32", "quantize": "w8a8_dynamic", "torch_dtype": "bfloat16"}, set(),
    ),
    "torch without MoE sizes": (
        TORCH | {"dp": 2, "cp": 1, "sp": 1, "tp": 8, "moe_ep": ..., "moe_tp": ...}, None, set(),
    ),
    "two nodes, cp over both": (EIGHT | {"worldSize": 8}, None, set()),
    "two nodes, tp over both": (
        NO_SIZES | EIGHT | {"worldSize": 8, "tp": 16, "--nodes": 2}, None, set(),
    ),
}  # fmt: skip


def checked(folder: Path, changes: dict[str, Any], weights: dict | None) -> Checked:
    """The first config of a file, whose weights are beside it where they are given."""
    document, options = build(changes | ({"modelWeightPath": "weights"} if weights else {}))
    if weights:
        (folder / "weights").mkdir()
        (folder / "weights" / "config.json").write_text(json.dumps(weights))
        del options["dtype"]
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    return check_files([path], **options)[0]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_server_refuses_is_refused_with_its_cause_first(tmp_path, kind):
    changes, weights, cause = REFUSED[kind]
    one = checked(tmp_path, changes, weights)
    assert [finding.rule for finding in one.of("error")][:1] == [cause]
    assert all(finding.rule == cause for finding in one.of("error")), one.of("error")


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_the_server_takes_is_accepted_and_laid_out(tmp_path, kind):
    changes, weights, warnings = ACCEPTED[kind]
    one = checked(tmp_path, changes, weights)
    assert {finding.rule for finding in one.findings} == warnings
    deployment = one.setting.deployment
    assert len(lay_out(deployment, 1000).cards) == deployment.world_size


def test_under_the_version_that_a_file_is_for_no_error_is_false(tmp_path):
    """Before head, multi-node files without sizes were usual, and worldSize counted all cards."""
    for kind, version in (
        ("two nodes without dp and tp", "2.1.RC1"),
        ("worldSize of two nodes, the cards of one", "2.3.0"),
    ):
        folder = tmp_path / version
        folder.mkdir()
        assert checked(folder, REFUSED[kind][0] | {"--version": version}, None).of("error") == []


@pytest.mark.parametrize("text", ["Atlas 800I A3", "800I-A3", "800i_a3", "Atlas 800I A3 SuperPoD", "800IA3"])
def test_a_server_may_be_spelt_as_on_the_page(tmp_path, text):
    one = checked(
        tmp_path, {"worldSize": 32, "dp": 2, "cp": 1, "sp": 1, "tp": 16, "moe_ep": 32, "--hardware": text}, None
    )
    (error,) = one.of("error")
    assert (error.rule, error.found) == ("cards-of-a-server", "32 cards on 1 × 800i-a3")
    assert "--nodes" in error.fix


# The text of a file


def model(**changes: Any) -> str:
    return json.dumps(build(changes)[0]["ModelDeployConfig"]["ModelConfig"][0], indent=1)


def fragments() -> dict[str, str]:
    deploy = json.dumps(build({})[0]["ModelDeployConfig"], indent=1)
    return {
        "a member": f'"ModelDeployConfig" :\n{deploy}\n',
        "a member and a comma": f'\n  "ModelDeployConfig" : {deploy},\n',
        "two members": f'"ServerConfig": {{"port": 1025}},\n"BackendConfig": {{"ModelDeployConfig": {deploy}}},',
        "a list": f'"ModelConfig" : [\n{model()}\n]',
        "a list and a comma": f'"ModelConfig" : [\n{model()}\n],\n',
        "an entry": model(),
        "an entry and a comma": f"{model()},",
        "an object and a comma": f'{{"ModelDeployConfig": {deploy}}},\n',
        "a list of few fields": '"ModelConfig": [{"modelName": "ds_r1_w8a8", "worldSize": 16,'
        ' "cp": 2, "sp": 8, "tp": 8, "moe_ep": 16, "moe_tp": 1}]',
        "a mark": f'\ufeff"ModelDeployConfig" : {deploy},',
        "lengths beside the list": f'"maxSeqLen": 2560, "maxInputTokenLen": 2048, "ModelConfig": [{model()}]',
    }


@pytest.mark.parametrize("kind", fragments())
def test_a_fragment_is_read_as_a_page_prints_it(tmp_path, kind):
    path = tmp_path / "page.json"
    path.write_bytes(fragments()[kind].encode())
    (one,) = check_files([path], dtype="float16")
    assert one.findings == ()
    assert one.setting.sizes.cp == 2
    assert not [note for note in one.notes if "not a field known here" in note]
    lines = fragments()[kind].removeprefix("\ufeff").split("\n")
    file = one.setting.deployment.file
    for field in ("cp", "modelName"):
        line, column = file.place(one.setting.deployment.path_of(field))
        assert lines[line - 1][column - 1 :].startswith(f'"{field}"')


def test_a_whole_config_that_ends_in_a_comma_is_refused_as_the_server_refuses_it(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(build({"Server.port": 1025})[0]) + ",\n")
    with pytest.raises(InputError, match="a comma behind the end"):
        read_config(path)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("cp_size", "cp"), ("CP", "cp"), ("moeEp", "moe_ep"), ("context_parallel_size", "cp"), ("tensorParallel", "tp"),
        ("modelWeigthPath", "modelWeightPath"), ("world_size", "worldSize"), ("cpp", "cp or pp"),
        ("maxSeqLen", "maxSeqLen in ModelDeployConfig"), ("port", "port in ServerConfig"), ("zzz", None),
    ],
)  # fmt: skip
def test_a_key_that_is_nearly_one_is_named_with_what_is_meant(tmp_path, key, meant):
    path = tmp_path / "config.json"
    text = json.dumps(build({key: 1})[0], indent=1)
    path.write_text(text)
    (note,) = read_deployment(path).warnings
    line = next(number for number, line in enumerate(text.split("\n"), 1) if f'"{key}": 1' in line)
    assert f"{shown(key)[1:-1]} is not a field known here" in note
    assert f"(line {line}, column 5)" in note
    assert note.endswith(f"; did you mean {meant}?" if meant else ")")


def test_a_field_that_is_missing_may_stand_there_misspelt(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(build({"worldSize": ..., "world_size": 16})[0]))
    with pytest.raises(InputError, match=r'worldSize is missing; it must be given \(.*\); is it "world_size"\?$'):
        read_deployment(path)


WHOLE = json.loads((Path(__file__).parents[2] / "examples" / "deepseek-r1-cp2.json").read_text())
COMPULSORY = [
    *(("ServerConfig", field) for field in ("port", "metricsPort", "tokenTimeout", "distDPServerEnabled")),
    *(("BackendConfig", field) for field in ("npuDeviceIds", "tokenizerProcessNumber", "interNodeTLSEnabled")),
    *(("BackendConfig", "ScheduleConfig", field) for field in ("maxQueueDelayMicroseconds", "supportSelectBatch")),
]


@pytest.mark.parametrize("path", COMPULSORY)
@pytest.mark.parametrize("version", [True, False])
def test_a_whole_config_lacks_what_it_does_not_have(tmp_path, path, version):
    """A config with nearly all that the server demands is whole, with or without its Version; under head only."""
    document = copy.deepcopy(WHOLE)
    section = document
    for step in path[:-1]:
        section = section[step]
    del section[path[-1]]
    if not version:
        del document["Version"]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(document))
    (error,) = check_files([file])[0].of("error")
    assert (error.rule[:8], error.found) == ("required", f"no {path[-1]}")
    assert check_files([file], version="2.3.0")[0].of("error") == []


def test_keys_that_todays_server_reads_are_known(tmp_path):
    changes = {
        "Schedule.prefillChunkSize": 1, "Schedule.dynamicBatchSizeEnable": True, "Schedule.enablChunkedPrefill": True,
        "Server.maxRequestLength": 40, "Server.HealthCheckConfig": {"npuUsageThreshold": 10}, "Server.tlsCrl": "",
        "Backend.kvPoolConfig": {"backend": "", "asyncWrite": False}, "kv_rdma_sl": 0, "pluginParams": "",
        "models": {"deepseekv2": {"parallel_options": {"hccl_buffer": 128}}, "qwen": {}},
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(build(changes)[0]))
    assert read_deployment(path).warnings == ()


def test_a_type_that_is_wrong_is_named_with_its_line(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(build({"cp": "2"})[0], indent=0))
    with pytest.raises(InputError, match=r'cp is the string "2"; it must be a whole number.* \(line 15, column 1\)'):
        read_deployment(path)


def test_the_weights_may_be_beside_the_config_or_here(tmp_path, monkeypatch):
    """A relative path is looked for from the working directory, then from the config's folder."""
    one = checked(tmp_path, {}, V3 | {"quantize": "w8a8"})
    assert one.findings == ()
    monkeypatch.chdir(tmp_path)
    again = setting_of(one.setting.deployment)
    assert [finding for finding in check(again) if finding.level == "error"] == []
    assert again.model_type == "deepseek_v3"


def test_weights_with_a_description_of_their_quantisation_are_not_called_unquantised(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "quant_model_description_w8a8.json").write_text("{}")
    (tmp_path / "weights" / "config.json").write_text(json.dumps(V3))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(build({"modelWeightPath": "weights"})[0]))
    assert check_files([path])[0].of("error") == []
