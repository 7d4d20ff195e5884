"""`python -m mmkd.cli`, which launchers start."""

from mmkd.cli import run

run()
