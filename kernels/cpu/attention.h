// Causal softmax attention over a paged cache: what is checked, and how work is shared.
//
// A query's operations depend on its own position and window only: not on the cache's block size,
// the chunk it arrived in, the queries computed beside it, or who computes what.
#pragma once

// Whether every position a query may read lies in a block that exists.
bool readable(const Attention& b) {
  for (int64_t s = 0; s < b.sequences; ++s) {
    const int64_t rows = b.starts[s + 1] - b.starts[s], needed = b.context[s];
    const int64_t size = b.kv.block_size;
    if (rows < 0 || needed < rows || ceil_div(needed, size) > b.table_width) return false;
    const int64_t seen = b.window ? most(0, needed - rows + 1 - b.window) : 0;
    for (int64_t p = seen / size; rows && p < ceil_div(needed, size); ++p) {
      const int32_t block = b.blocks[s * b.table_width + p];
      if (block < 0 || block >= b.kv.num_blocks) return false;
    }
  }
  return true;
}

struct Span {
  int64_t first, count;  // segments that a tile sees
};

Span segments_of(const Attention& b, const Tile& tile) {
  const int64_t from = see(b, tile, 0).from, to = see(b, tile, tile.count - 1).to;
  return {from / kSegment, ceil_div(to, kSegment) - from / kSegment};
}

// Tiles of up to `size` queries.
template <class Body>
void each_tile(const Attention& b, int64_t size, const Body& body) {
  const int64_t group = b.heads / b.kv.kv_heads;
  for (int32_t s = 0; s < b.sequences; ++s) {
    const int64_t queries = (b.starts[s + 1] - b.starts[s]) * group;
    for (int32_t g = 0; g < b.kv.kv_heads; ++g)
      for (int64_t i = 0; i < queries; i += size)
        body(Tile{s, g, static_cast<int32_t>(i), static_cast<int32_t>(least(size, queries - i)),
                  -1, 0});
  }
}

int64_t work_of(const Attention& b) {
  int64_t work = 0;
  for (int64_t s = 0; s < b.sequences; ++s) {
    const int64_t rows = b.starts[s + 1] - b.starts[s];
    const int64_t seen = b.window ? least(b.window + rows, b.context[s]) : b.context[s];
    work += rows * seen * b.heads * (b.kv.head_size + b.kv.value_size);
  }
  return work;
}

void attend_all_floats(const Attention& b) {
  int64_t count = 0;
  each_tile(b, kQueries, [&](const Tile&) { ++count; });
  Tile* tiles = static_cast<Tile*>(scratch(0, sizeof(Tile) * count));
  int64_t n = 0;
  each_tile(b, kQueries, [&](const Tile& tile) { tiles[n++] = tile; });
  each(count, work_of(b), [&](int64_t i) { attend_floats(b, tiles[i]); });
}

// States of segments that are walked apart take at most this much memory.
constexpr int64_t kMostStates = 8 << 20;

template <class Kind>
void attend_all_units(const Attention& b) {
  const Layout l = layout_of(b.kv);
  const int64_t state = state_floats(l.value_tiles * kLanes);
  int64_t tiles = 0, apart = 0, floats = 0, queries = 0;
  each_tile(b, kTile, [&](const Tile& tile) {
    const int64_t segments = segments_of(b, tile).count;
    ++tiles;
    apart += segments;
    if (segments < 2) return;
    queries += tile.count;
    floats += segments * tile.count * state;
  });
  const bool split = queries && floats * 4 <= kMostStates;
  const int64_t count = split ? apart : tiles, bytes = split ? ceil_div(floats, kLanes) * 64 : 0;
  uint8_t* room = static_cast<uint8_t*>(
      scratch(0, bytes + count * static_cast<int64_t>(sizeof(Tile)) +
                     queries * static_cast<int64_t>(sizeof(Ending))));
  float* states = reinterpret_cast<float*>(room);
  Ending* endings = reinterpret_cast<Ending*>(room + bytes);
  Tile* items = reinterpret_cast<Tile*>(endings + queries);
  int64_t n = 0, m = 0, used = 0;
  each_tile(b, kTile, [&](Tile tile) {
    const Span span = segments_of(b, tile);
    if (!split || span.count < 2) {
      items[n++] = tile;
      return;
    }
    const int64_t stride = tile.count * state;
    for (int32_t i = 0; i < tile.count; ++i)
      endings[m++] = {{tile.sequence, tile.kv_head, tile.first + i, 1, span.first, used + i * state},
                      stride};
    for (int64_t s = 0; s < span.count; ++s) {
      items[n] = tile;
      items[n].segment = span.first + s;
      items[n++].state = used + s * stride;
    }
    used += span.count * stride;
  });
  const int64_t work = work_of(b);
  each(count, work, [&](int64_t i) { attend_units<Kind>(b, l, items[i], states); });
  each(m, work, [&](int64_t i) { merge_states(b, l, endings[i], states); });
}

bool paged_attention(const Attention& b) {
  if (!readable(b)) return false;
  switch (b.kv.type) {
    case KvType::kFloat32: attend_all_floats(b); break;
    case KvType::kBfloat16: attend_all_units<Bf16>(b); break;
    case KvType::kInt8: attend_all_units<Int8>(b); break;
  }
  return true;
}
