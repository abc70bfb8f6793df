"""The papers, as pure functions: losses, train steps, and what they share."""
