"""MindIE-Motor's user_config.json: two parts of a server's config, with roles, pods and NPUs; and linked pairs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cpjax.errors import InputError
from cpjax.mindie.check import check_files
from cpjax.mindie.commands import app
from cpjax.mindie.config import read_configs
from cpjax.mindie.crosscheck import cases_of
from cpjax.mindie.deployment import read_deployment
from cpjax.mindie.link import read_pair

EXAMPLES = Path(__file__).parents[2] / "examples"


def part(ids: list[int], *, distributed: bool, several: bool, **model: Any) -> dict[str, Any]:
    """One side; what it leaves out stands in the server's own file."""
    entry = {"modelName": "ds_r1", "modelWeightPath": "/mnt/deepseek_r1_w8a8", "worldSize": len(ids)} | model
    return {
        "ServerConfig": {"inferMode": "dmi", "distDPServerEnabled": distributed},
        "BackendConfig": {
            "npuDeviceIds": [ids],
            "multiNodesInferEnabled": several,
            "ModelDeployConfig": {"maxSeqLen": 4096, "maxInputTokenLen": 2048, "ModelConfig": [entry]},
            "ScheduleConfig": {"maxPrefillTokens": 2048, "distributedEnable": distributed},
        },
    }


PREFILL = part(list(range(8)), distributed=False, several=True, cp=2, sp=8, tp=8, moe_ep=16, moe_tp=1)
DECODE = part([0], distributed=True, several=False, dp=32, tp=1, moe_ep=32, moe_tp=1)
USER = {
    "version": "v1.0",
    "deploy_config": {
        "p_instances_num": 1, "d_instances_num": 1, "single_p_instance_pod_num": 2, "single_d_instance_pod_num": 4,
        "p_pod_npu_num": 8, "d_pod_npu_num": 8, "hardware_type": "800I_A2", "image_name": "mindie", "job_id": "a",
    },
    "mindie_ms_controller_config": {},
    "mindie_ms_coordinator_config": {},
    "mindie_server_prefill_config": PREFILL,
    "mindie_server_decode_config": DECODE,
}  # fmt: skip


@pytest.fixture
def put(tmp_path):
    def write(change=lambda user: None) -> Path:
        user = copy.deepcopy(USER)
        change(user)
        path = tmp_path / "user_config.json"
        path.write_text(json.dumps(user, indent=2))
        return path

    return write


def model(user: dict, role: str) -> dict:
    return user[f"mindie_server_{role}_config"]["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]


def test_both_parts_are_checked_with_their_roles_worlds_and_hardware(put):
    prefill, decode = check_files([put()], dtype="float16")
    assert (prefill.findings, decode.findings, prefill.notes, decode.notes) == ((), (), (), ())
    assert (prefill.setting.role, prefill.setting.deployment.nodes, prefill.setting.sizes.world_size) == (
        "prefill", 2, 16,
    )  # fmt: skip
    assert (decode.setting.role, decode.setting.deployment.nodes, decode.setting.sizes.world_size) == ("decode", 4, 32)
    assert prefill.setting.hardware == decode.setting.hardware == "800i-a2"


def test_the_world_is_that_of_the_pods(put):
    def fewer(user):
        user["deploy_config"] |= {"single_p_instance_pod_num": 4, "single_d_instance_pod_num": 3}

    prefill, decode = check_files([put(fewer)], dtype="float16")
    assert {finding.rule for finding in prefill.of("error")} == {"world-product", "moe-product"}
    assert {finding.rule for finding in decode.of("error")} == {"world-product", "moe-product"}


def test_findings_stand_where_they_are_in_the_one_file(put):
    def split(user):
        model(user, "decode")["cp"] = 2

    path = put(split)
    text = path.read_text().split("\n")
    _, decode = check_files([path], dtype="float16")
    finding = next(finding for finding in decode.findings if finding.rule == "decode-without-cp")
    assert finding.path == "$.mindie_server_decode_config.BackendConfig.ModelDeployConfig.ModelConfig[0].cp"
    assert text[finding.line - 1][finding.column - 1 :].startswith('"cp": 2')
    assert finding.line > next(number for number, line in enumerate(text) if "mindie_server_decode" in line)


def test_the_parts_must_fit_each_other(put):
    def other(user):
        model(user, "decode")["modelName"] = "another-label"
        model(user, "decode")["modelWeightPath"] = "/mnt/deepseek_v3_w8a8"

    _, decode = check_files([put(other)], dtype="float16")
    assert [finding.rule for finding in decode.of("error")] == ["pair-same-model"]


def test_one_part_can_be_chosen_and_is_alone(put):
    (decode,) = check_files([put()], roles=["decode"])
    assert decode.setting.sizes.dp == 32
    with pytest.raises(InputError, match="no part for role hybrid"):
        check_files([put()], roles=["hybrid"])
    with pytest.raises(InputError, match="check it alone"):
        check_files([put(), EXAMPLES / "decode.json"])
    with pytest.raises(InputError, match="take --nodes out"):
        check_files([put()], nodes=2)
    with pytest.raises(InputError, match="prefill and decode; say which is meant with --role"):
        read_deployment(put())


def test_a_part_that_is_no_config_is_named(put):
    def empty(user):
        user["mindie_server_decode_config"] = {"BackendConfig": {}}

    with pytest.raises(InputError, match=r"\$.mindie_server_decode_config has no ModelDeployConfig"):
        read_configs(put(empty))

    def none(user):
        user["mindie_server_prefill_config"] = None

    with pytest.raises(InputError, match=r"\$.mindie_server_prefill_config is null; it must be an object \(line 16,"):
        read_configs(put(none))


def test_the_prefill_part_is_computed_and_cp_is_turned_on_in_it(put, tmp_path, capsys):
    cases, remarks = cases_of(put(), tokens=40, geometry="16,128,64,128")
    assert (cases[0].cp, len(remarks)) == (2, 2)
    path = put(lambda user: model(user, "prefill").update(cp=1, sp=1, dp=2))
    before, output = path.read_text(), tmp_path / "new.json"
    with pytest.raises(SystemExit) as ended:
        app(["enable", str(path), "--dtype", "float16", "-o", str(output)])
    assert ended.value.code in (0, None), capsys.readouterr().err
    after = json.loads(output.read_text())
    assert {name: model(after, "prefill")[name] for name in ("dp", "cp", "sp", "tp")} == dict(dp=1, cp=2, sp=8, tp=8)
    assert model(after, "decode") == model(USER, "decode")
    assert len(output.read_text().split("\n")) == len(before.split("\n"))
    written = output.read_bytes()
    with pytest.raises(SystemExit):
        app(["enable", str(output), "-o", str(tmp_path / "again.json")])
    assert not (tmp_path / "again.json").exists()
    assert output.read_bytes() == written
    assert "nothing to change, nothing written" in capsys.readouterr().out


# Links


def test_a_motor_file_is_a_pair(put):
    prefill, decode = read_pair(put(), None)
    assert (prefill.sizes.cp, prefill.sizes.world_size, decode.sizes.dp) == (2, 16, 32)
    with pytest.raises(InputError, match="give that of the decode instance too"):
        read_pair(EXAMPLES / "prefill-cp2.json", None)


def test_prefill_and_decode_exchanged_are_not_linked(tmp_path):
    with pytest.raises(InputError, match="has cp 2, sp 8, prefix_cache, which only a prefill node may have"):
        read_pair(EXAMPLES / "decode.json", EXAMPLES / "prefill-cp2.json")
    plain = {"cp": 1, "sp": 1, "tp": 16}
    for name, config in (("p", PREFILL), ("d", DECODE)):
        config = copy.deepcopy(config)
        entry = config["BackendConfig"]["ModelDeployConfig"]["ModelConfig"][0]
        entry |= {} if name == "d" else plain
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    assert read_pair(tmp_path / "p.json", tmp_path / "d.json")[1].sizes.dp == 32
    with pytest.raises(InputError, match="has distributedEnable, as decode nodes do"):
        read_pair(tmp_path / "d.json", tmp_path / "p.json")
