"""Where rows come from and how they become batches: sources, formats, tokenizers, pipelines, the embedded world."""
