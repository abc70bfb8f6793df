"""From prompts to scored responses: sampling, what every model says of a response, where scores come from."""
