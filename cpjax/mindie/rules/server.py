"""ServerConfig: addresses, ports, limits of connections and time, certificates' lists, the role of the instance."""

import ipaddress
import re

from cpjax.mindie.rules.rule import MANAGER, PARAMETERS, SERVER, Rule, Setting, given, in_range, one_of, value

_PORTS = ("port", "managementPort", "metricsPort", "interCommPort")
_LWD_PORTS = ("layerwiseDisaggregatedDataPort", "layerwiseDisaggregatedCrtlPort")
_LWD_ADDRESSES = ("layerwiseDisaggregatedMasterIpAddress", "layerwiseDisaggregatedSlaveIpAddress")


def _is_address(text: str) -> bool:
    """common_util.cpp takes IPv4 with four numbers, and IPv6 with or without brackets."""
    try:
        if "." in text and ":" not in text:
            return ipaddress.ip_address(text).version == 4
        inner = re.fullmatch(r"\[(.*)\]", text)
        return ipaddress.ip_address(inner[1] if inner else text).version == 6
    except ValueError:
        return False


def _address(field: str) -> Rule:
    def broken(s: Setting) -> str | None:
        text = given(s, field)
        return value(text is not None and not _is_address(text), repr(text))

    says = f"{field} is an IPv4 or IPv6 address"
    fix = "give an address of this host, or 127.0.0.1"
    return Rule(f"{field}-is-one", field, "error", True, says, fix, f"common_util.cpp; {SERVER}", broken)


def _zero_address(field: str) -> Rule:
    def broken(s: Setting) -> str | None:
        is_zero = given(s, field) in ("0.0.0.0", "::", "[::]")
        return value(is_zero and not s.server.allowAllZeroIpListening, given(s, field))

    says = f"{field} is all zeros only with allowAllZeroIpListening true"
    fix = "give one address; listening on all is a risk that allowAllZeroIpListening accepts"
    return Rule(f"{field}-is-not-zero", field, "error", True, says, fix, f"common_util.cpp; {SERVER}", broken)


def _lists(s: Setting) -> list[str]:
    """Lists of certificates that are too short or too long: authorities 1 to 3, revocations at most 3."""
    asked = [(s.server.httpsEnabled, s.server, "tlsCaFile", "tlsCrlFiles")]
    asked += [(s.backend.interNodeTLSEnabled, s.backend, "interNodeTlsCaFiles", "interNodeTlsCrlFiles")]
    found = []
    for is_on, section, authorities, revocations in asked:
        for field, least in ((authorities, 1), (revocations, 0)):
            files = getattr(section, field)
            if is_on and isinstance(files, list) and not least <= len(files) <= 3:
                found.append(f"{field} has {len(files)}")
    return found


def _wrong_lwd(s: Setting) -> list[str]:
    """Addresses and ports of layerwise disaggregation that the server refuses."""
    if not s.server.layerwiseDisaggregated:
        return []
    found = []
    for field in _LWD_ADDRESSES:
        for text in _listed(given(s, field)):
            if not isinstance(text, str) or not _is_address(text) or text in ("0.0.0.0", "::"):
                found.append(f"{field} {text!r}")
    for field in _LWD_PORTS:
        for port in _listed(given(s, field)):
            if not isinstance(port, int) or not 1024 <= port <= 65535:
                found.append(f"{field} {port!r}")
    return found


def _listed(given_value: object) -> list:
    return given_value if isinstance(given_value, list) else [] if given_value is None else [given_value]


def _beside_lwd(s: Setting) -> list[str]:
    """What layerwise disaggregation does not go with."""
    if not s.server.layerwiseDisaggregated:
        return []
    not_with = {
        "multiNodesInferEnabled": s.is_multi_node,
        "distDPServerEnabled": s.server.distDPServerEnabled,
        f"backendType {s.model.backendType}": s.model.backendType not in (None, "atb"),
        f"templateType {s.schedule.templateType}": s.schedule.templateType != "Standard",
        "supportSelectBatch": s.schedule.supportSelectBatch,
        "bufferResponseEnabled": s.schedule.bufferResponseEnabled,
    }
    return [name for name, is_on in not_with.items() if is_on]


# fmt: off
SERVERS: tuple[Rule, ...] = (
    Rule("infer-mode", "inferMode", "error", True, "inferMode is standard or dmi; which side of a pair an instance is, "
         "prefill or decode, is told it later", 'set inferMode to "dmi" for prefill and decode, else to "standard"',
         f"{SERVER}; {PARAMETERS}", lambda s: value(s.server.inferMode not in ("standard", "dmi"),
                                                    repr(s.server.inferMode))),
    *map(_address, ("ipAddress", "managementIpAddress")),
    *map(_zero_address, ("ipAddress", "managementIpAddress")),
    *(in_range(port, 1024, 65535, SERVER) for port in _PORTS),
    Rule("port-is-not-the-nodes", "port", "error", True, "port and multiNodesInferPort differ", "change one of them",
         MANAGER, lambda s: value(given(s, "port") is not None and s.server.port == s.backend.multiNodesInferPort,
                                  s.server.port)),
    in_range("maxLinkNum", 1, 4096, SERVER),
    in_range("tokenTimeout", 1, 3600, SERVER),
    in_range("e2eTimeout", 1, 65535, SERVER),
    in_range("maxRequestLength", 1, 100, SERVER),
    in_range("maxJsonDepth", 10, 100, SERVER, "head"),
    Rule("npuUsageThreshold-range", "HealthCheckConfig", "error", True, "npuUsageThreshold is 0 to 100",
         "give it such a value", SERVER,
         lambda s: value((s.server.HealthCheckConfig.npuUsageThreshold or 0) > 100,
                         s.server.HealthCheckConfig.npuUsageThreshold)),
    Rule("certificate-lists", "httpsEnabled", "error", True, "with TLS on, 1 to 3 files of authorities are given and "
         "at most 3 of revocations", "give so many", f"{SERVER}; backend_config.cpp",
         lambda s: value(bool(_lists(s)), ", ".join(_lists(s)))),
    one_of("layerwiseDisaggregatedRoleType", ("master", "slave"), SERVER),
    Rule("layerwise-addresses", "layerwiseDisaggregated", "error", True, "with layerwise disaggregation, its addresses "
         "are addresses, not all zeros, and its ports 1024 to 65535", "correct them", SERVER,
         lambda s: value(bool(_wrong_lwd(s)), ", ".join(_wrong_lwd(s)))),
    Rule("layerwise-alone", "layerwiseDisaggregated", "error", True, "layerwise disaggregation goes with backendType "
         "atb, templateType Standard, one node, and without distDPServerEnabled, supportSelectBatch and "
         "bufferResponseEnabled", "take them out", MANAGER,
         lambda s: value(bool(_beside_lwd(s)), ", ".join(_beside_lwd(s)))),
)
# fmt: on
