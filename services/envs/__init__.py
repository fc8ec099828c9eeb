"""The environments that come with sdar, and the service that serves a run's environment."""
