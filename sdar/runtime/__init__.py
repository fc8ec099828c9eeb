"""What services run on: bus, weight store, RPC, settings, telemetry, lifecycle, models. Knows no service and no algorithm."""
