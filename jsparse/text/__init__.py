"""Text and token ids: tokenizers from a checkpoint's files, chat templates, incremental decoding, stop texts."""
