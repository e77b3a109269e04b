// As attention_hopper_backward.cu, with tiles of which each warpgroup has one gradient.
#define BK_TILE_COLS 192
#include "attention_hopper_backward.cu"
