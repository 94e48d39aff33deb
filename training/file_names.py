"""What the files are called that commands write beside a head."""

SETTINGS_NAME = "training.json"
METRICS_NAME = "metrics.jsonl"
DIAGNOSTICS_NAME = "diagnostics.jsonl"
SWEEP_NAME = "sweep.json"
CALIBRATION_NAME = "calibration.json"
