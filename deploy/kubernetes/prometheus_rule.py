"""Writes components/monitoring/prometheusrule.yaml: `make prometheus-rule`.

The Prometheus operator takes rules as objects of its own. Kustomize cannot put a file into one, so
the objects repeat deploy/prometheus/rules, one a file, and a test compares them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

RULES: Final = Path(__file__).parents[1] / "prometheus" / "rules"
FILE: Final = Path(__file__).parent / "components" / "monitoring" / "prometheusrule.yaml"
HEAD: Final = """\
---
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: ambidex-{name}
  labels:
    app.kubernetes.io/name: ambidex
spec:
  groups:
"""


def prometheus_rules(rules: Path = RULES) -> str:
    """The objects' YAML: the groups of each file, two columns further in, comments included.

    One object a file: the groups of an object must have different names, those of two files may
    have the same.
    """
    text = "# Written by `make prometheus-rule` from deploy/prometheus/rules: change those.\n"
    for file in sorted(rules.glob("*.yml")):
        _, _, groups = file.read_text(encoding="utf-8").partition("\ngroups:\n")
        text += HEAD.format(name=file.stem)
        text += "".join(f"  {line}".rstrip() + "\n" for line in groups.splitlines())
    return text


if __name__ == "__main__":
    FILE.write_text(prometheus_rules(), encoding="utf-8")
