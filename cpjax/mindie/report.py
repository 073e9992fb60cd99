"""What a person sees of a check: findings as blocks of text."""

from collections.abc import Iterator

from cpjax.mindie.check import Checked, Finding
from cpjax.mindie.config import printable
from cpjax.mindie.rules import PAIRS, RULES


def findings_text(checked: Checked) -> Iterator[str]:
    """A config's findings, a block each, and a last line that says it in words."""
    setting = checked.setting
    name = printable(setting.deployment.path)
    for finding in checked.findings:
        mark = "error  " if finding.level == "error" else "warning"
        yield f"{mark} {finding.rule}: {finding.found}"
        yield f"        at    {finding.path}"
        yield f"        rule  {finding.says}"
        yield f"        from  {finding.source}; {who(finding)}"
        yield f"        fix   {finding.fix}"
    for note in checked.notes:
        yield f"note    {note}"
    errors, warnings = checked.of("error"), checked.of("warning")
    known = f"role {setting.role or 'not known'}, documentation {setting.version}"
    if not errors:
        yield f"{name}: accepted, {_count(warnings, 'warning')} ({known})"
        return
    silent = [finding for finding in errors if not finding.enforced]
    told = "the server catches all of them" if not silent else f"the server would not catch {len(silent)} of them"
    yield f"{name}: refused, {_count(errors, 'error')}, {_count(warnings, 'warning')}; {told} ({known})"


def who(finding: Finding) -> str:
    """Who enforces a rule."""
    return "enforced by the server" if finding.enforced else "only documented, the server does not check it"


def _count(findings: list[Finding], what: str) -> str:
    return f"{len(findings)} {what}{'' if len(findings) == 1 else 's'}"


def rules_markdown() -> Iterator[str]:
    """All rules as a Markdown table; the one in docs/mindie.md is this."""
    yield "| rule | field | level | the server | what it says | source |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for rule in (*RULES, *PAIRS):
        server = "checks it" if rule.enforced else "does not check it"
        says = rule.says.replace("|", "\\|")
        yield f"| `{rule.name}` | `{rule.field}` | {rule.level} | {server} | {says} | {rule.source} |"
