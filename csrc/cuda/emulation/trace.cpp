// Notes what threads ask of barriers, copies and products: emulator.h says what.
#include "async.h"

namespace simt {
namespace {

bool wanted = false;
std::vector<Noted> all;

}  // namespace

void trace(bool on) {
  wanted = on;
  all.clear();
}
const std::vector<Noted>& traces() { return all; }

void begin_trace(int64_t blocks, int64_t threads, int64_t shared) {
  tracing = wanted;
  if (tracing) all.push_back({-1, -1, "launch", blocks, threads, shared});
}
void note_now(const char* what, int64_t a, int64_t b, int64_t c) {
  const int64_t block = current->block.x + int64_t{grid_size.x} * current->block.y;
  all.push_back({block, static_cast<int>(current->thread.x), what, a, b, c});
}

}  // namespace simt
