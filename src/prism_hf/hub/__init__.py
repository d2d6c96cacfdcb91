"""Cards, figures, and the only code that writes to the Hub."""
