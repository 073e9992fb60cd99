"""Fields that must be given. What a part of a config leaves out is not missed: only the whole file can lack it."""

from cpjax.mindie.rules.rule import BACKEND, DEPLOY, PARAMETERS, SCHEDULE, SERVER, VERSIONS, Rule, Setting, value

_SERVER = """ipAddress port maxLinkNum httpsEnabled inferMode allowAllZeroIpListening metricsPort tokenTimeout
    e2eTimeout distDPServerEnabled"""
_BACKEND = """backendName tokenizerProcessNumber modelInstanceNumber npuDeviceIds ScheduleConfig multiNodesInferEnabled
    interNodeTLSEnabled"""
_SCHEDULE = """templateName templateType cacheBlockSize decodePolicyType decodeTimeMsPerReq maxBatchSize maxPreemptCount
    maxPrefillTokens maxIterTimes maxPrefillBatchSize maxQueueDelayMicroseconds prefillPolicyType prefillTimeMsPerReq
    supportSelectBatch"""
_MODEL = "modelWeightPath cpuMemSize npuMemSize backendType"


def _lacks(given: set[str], fields: str) -> str | None:
    missing = [field for field in fields.split() if field not in given]
    return value(bool(missing), f"no {', '.join(missing)}")


def _model(s: Setting) -> str | None:
    """MindIE-Motor puts its parts into the server's own file, and `"ModelConfig": […]` alone is a part of it too."""
    if s.deployment.file.role or s.deployment.file.at == ():
        return None
    trust = " trustRemoteCode" if s.since("1.0.0") else ""
    given = s.model.model_fields_set | s.deployment.deploy.model_fields_set
    return _lacks(given, f"{_MODEL}{trust} maxInputTokenLen maxSeqLen")


def _is_whole(s: Setting) -> bool:
    """Is it a server's whole config.json? It has Version, or nearly all that must be given.

    A page's fragment and a part of MindIE-Motor's file are put into such a config, which has the rest.
    """
    sections = ((s.server, _SERVER), (s.backend, _BACKEND), (s.schedule, _SCHEDULE))
    asked = [field in section.model_fields_set for section, fields in sections for field in fields.split()]
    return not s.deployment.file.role and ("Version" in s.deployment.file.document or sum(asked) > 0.75 * len(asked))


def _whole(s: Setting, given: set[str], fields: str) -> str | None:
    """Only of a file that is whole."""
    return _lacks(given, fields) if _is_whole(s) else None


# fmt: off
REQUIRED: tuple[Rule, ...] = (
    Rule("format-of-version", "ModelConfig", "error", False, "before 1.0.RC3 a config has the sections OtherParam, "
         "WorkFlowParam, ModelDeployParam and ScheduleParam", "give --mindie-version the version that the file is for",
         "upgrade_info.json of MindIE-Motor", lambda s: "ModelDeployConfig", VERSIONS[0], "1.0.RC3"),
    Rule("required-fields", "ModelConfig", "error", True, "these fields must be given", "add them", DEPLOY, _model),
    Rule("required-server-fields", "inferMode", "error", True, "a whole config's ServerConfig has these fields",
         "add them", f"{SERVER}; {PARAMETERS}",
         lambda s: _whole(s, s.server.model_fields_set, _SERVER), "head"),
    Rule("required-backend-fields", "npuDeviceIds", "error", True, "a whole config's BackendConfig has these fields",
         "add them", f"{BACKEND}; {PARAMETERS}",
         lambda s: _whole(s, s.backend.model_fields_set, _BACKEND), "head"),
    Rule("required-schedule-fields", "templateType", "error", True, "a whole config's ScheduleConfig has these fields",
         "add them", f"{SCHEDULE}; {PARAMETERS}",
         lambda s: _whole(s, s.schedule.model_fields_set, _SCHEDULE), "head"),
)
# fmt: on
