"""The report of the protocol "validation"."""

import json


def write_validation_report(config, facts, outcome, folder):
    path = folder / "results.json"
    path.write_text(
        json.dumps([outcome.rows, {k: [vars(t) for t in v] for k, v in outcome.targets.items()}])
    )
    return "", path
