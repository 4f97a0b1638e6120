"""Lift, normalise, classify, lower, validate: one file a stage, `pipeline.py` names their order."""
