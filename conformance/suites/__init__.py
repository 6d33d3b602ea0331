"""What pytest runs against every kernel."""
