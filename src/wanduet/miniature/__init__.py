"""The bundled miniature: the weights of a small Wan (`model/`, for few steps `fast/`) and the words it was trained on."""
