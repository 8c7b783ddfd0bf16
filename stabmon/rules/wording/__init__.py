"""Say in words what issues are about, for terminals, dashboards and pages."""
