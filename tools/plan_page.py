"""Write the generated parts of docs/plan.md again: tables, errors, sentences. `make plan` draws its pictures first."""

import re
import sys
from pathlib import Path

from cpjax.plan.constants import frozen
from cpjax.plan.deployment import from_config
from cpjax.plan.gain import Plan, plan, settings, usual_cps
from cpjax.plan.hardware import devices
from cpjax.plan.model import models
from cpjax.plan.published import rows
from cpjax.plan.report import published_markdown, sentences, why
from cpjax.plan.setting import Setting

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "plan.md"
HEADINGS = (
    *("tokens", "cp", "tp", "cards", "time s", "speed-up", "attention s", "products s", "exposed s", "reductions s"),
    *("received GB", "card GB", "fits", "longest"),
)


def choices(found: Plan) -> str:
    """All lengths of a plan in one table, and from where on cp pays."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|" + " ---: |" * len(HEADINGS)]
    for at, tokens in enumerate(found.tokens):
        for choice in found.choices:
            one, held = choice.predictions[at], choice.memories[at].total
            cells = (
                *(f"{tokens:,}", choice.setting.cp, choice.setting.tp, choice.setting.cards, f"{one.seconds:.3g}"),
                f"{found.speedup(choice, at):.2f}",
                *(f"{x:.3g}" for x in (one.attention, one.products, one.exposed, one.reductions, one.received / 1e9)),
                *(f"{held / 1e9:.1f}", "yes" if choice.fits[at] else "no", f"{choice.longest:,}"),
            )
            lines.append(f"| {' | '.join(map(str, cells))} |")
    pays = [line for line in sentences(found) if " against cp " in line]
    return "\n".join([*lines, "", *(f"- {line}" for line in pays)])


def parts() -> dict[str, str]:
    """The generated parts by name."""
    constants, published = frozen(), list(rows(frozen()))
    base, _ = from_config(ROOT / "examples" / "deepseek-r1-cp2.json", devices(), None)
    deepseek = plan(settings(base, usual_cps(base, 16), 16), constants, (2048, 8192, 131072))
    llama = Setting(models()["Llama-3.1-405B"], devices()["h100"], tp=8)
    return {
        "deepseek": choices(deepseek),
        "llama": choices(plan(settings(llama, (1, 2, 4, 8, 16), None), constants, (8192, 131072, 1048576))),
        "errors": published_markdown(published),
        "why": "\n".join(line if line.startswith(" ") else f"- {line}" for line in why(published)).replace(
            "\n  ", "\n  - "
        ),
    }


def main() -> None:
    """Rewrite the page; fail if a part has no place in it."""
    text = PAGE.read_text(encoding="utf-8")
    for name, part in parts().items():
        pattern = re.compile(rf"(<!-- made: {name} -->\n).*?(<!-- end -->)", re.S)
        text, count = pattern.subn(lambda found, part=part: f"{found[1]}\n{part}\n\n{found[2]}", text)
        if count != 1:
            sys.exit(f"{PAGE} has {count} places for {name}; it must have one")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
