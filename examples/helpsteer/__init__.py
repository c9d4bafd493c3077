"""HelpSteer's ratings as preferences."""
