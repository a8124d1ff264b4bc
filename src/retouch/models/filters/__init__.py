"""One-shot filters: any image-to-image or mask model that a small TOML describes, run as an EditModel of one step."""
