"""What a person sees of a check: findings as blocks of text."""

from collections.abc import Iterator

from cpjax.mindie.check import Checked, Finding
from cpjax.mindie.rules import PAIRS, RULES, VERSIONS, Rule
from cpjax.mindie.text_file import printable


def findings_text(checked: Checked) -> Iterator[str]:
    """A config's findings, a block each, and a last line that says it in words."""
    setting = checked.setting
    name = printable(setting.deployment.path)
    for finding in checked.findings:
        mark = "error  " if finding.level == "error" else "warning"
        yield f"{mark} {finding.rule}: {finding.found}"
        yield f"        at    {name}:{finding.line}:{finding.column}  {finding.path}"
        yield f"        rule  {finding.says}"
        yield f"        from  {finding.source}; {who(finding, setting.version)}"
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


def who(finding: Finding, version: str = VERSIONS[-1]) -> str:
    """Who enforces a rule. Only the code of head was seen."""
    if not finding.enforced:
        return "only documented, the server does not check it"
    unseen = "" if version == VERSIONS[-1] else f" of head; the code of {version} was not seen"
    return f"enforced by the server{unseen}"


def _count(findings: list[Finding], what: str) -> str:
    return f"{len(findings)} {what}{'' if len(findings) == 1 else 's'}"


def rules_markdown() -> Iterator[str]:
    """All rules as a Markdown table; the one in docs/mindie.md is this."""
    yield "| rule | field | level | the server | versions | what it says | source |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for rule in (*RULES, *PAIRS):
        server = "checks it" if rule.enforced else "does not check it"
        says = rule.says.replace("|", "\\|")
        versions = rule.versions if isinstance(rule, Rule) else "all"
        yield f"| `{rule.name}` | `{rule.field}` | {rule.level} | {server} | {versions} | {says} | {rule.source} |"
