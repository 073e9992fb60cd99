"""Servers with NPUs, as people spell them."""

import re

HARDWARE = {"800i-a2": 8, "800i-a3": 16}
"""Servers that CP runs on → their NPUs (an A3 module is two). Atlas 800I A2; Atlas 800I A3 SuperPoD."""

MOTOR_TYPES = ("800I_A2", "800I_A3")
"""hardware_type in MindIE-Motor's user_config.json."""


def parse_hardware(text: str) -> str:
    """A server's name as here; a name that is not known stays as it is.

    >>> parse_hardware("Atlas 800I A3 SuperPoD"), parse_hardware("800I_A2"), parse_hardware("300i-duo")
    ('800i-a3', '800i-a2', '300i-duo')
    """
    plain = re.sub(r"[^0-9a-z]|atlas|superpod|server|inference", "", text.lower())
    return next((name for name in HARDWARE if name.replace("-", "") == plain), text.lower())
