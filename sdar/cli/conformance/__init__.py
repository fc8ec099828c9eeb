"""`sdar env check`: what every environment server must do, tried over the wire alone.

`runner` tries the checks, `report` shows the verdicts; `discovery`, `sessions`, `steps`, `episodes`
and `aftermath` hold the checks, `bench` is what they reach the server with, `actions` how they
write one. Nothing here knows an environment.
"""

from sdar.cli.conformance.runner import ALL_CHECKS, Report, check_server

__all__ = ["ALL_CHECKS", "Report", "check_server"]
