"""From a prompt's ids to an answer's ids. Knows neither tokenizers nor HTTP."""
