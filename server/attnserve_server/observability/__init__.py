"""Every metric, declared once; logs."""
