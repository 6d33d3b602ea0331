"""Everything is in the plugin; the harness's own tests also drive pytest itself."""

pytest_plugins = ["pytester"]
