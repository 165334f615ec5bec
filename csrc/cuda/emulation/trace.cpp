// Notes what threads ask of barriers, copies and products: emulator.h says how it is written.
#include <algorithm>

#include "async.h"

namespace simt {

bool tracing = false;

namespace {

struct Event {
  const char* kind;
  int64_t a, b;
  std::vector<std::pair<uint32_t, uint32_t>> ranges;
};
bool wanted = false;
std::vector<std::vector<Event>> events;  // of each thread
std::vector<std::string> texts;

/// In order, neighbours as one.
void tidy(std::vector<std::pair<uint32_t, uint32_t>>& ranges) {
  std::sort(ranges.begin(), ranges.end());
  size_t last = 0;
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first <= ranges[last].second)
      ranges[last].second = std::max(ranges[last].second, ranges[i].second);
    else
      ranges[++last] = ranges[i];
  }
  if (!ranges.empty()) ranges.resize(last + 1);
}

}  // namespace

void trace(bool on) {
  wanted = on;
  texts.clear();
}
const std::vector<std::string>& traces() { return texts; }

void begin_trace(size_t threads) {
  tracing = wanted;
  events.assign(tracing ? threads : 0, {});
}

void note(const char* kind, int64_t a, int64_t b) {
  if (!tracing) return;
  std::vector<Event>& mine = events[thread_number()];
  const auto same = [&](const char* access) {
    return std::strcmp(kind, access) == 0 && !mine.empty() && std::strcmp(mine.back().kind, access) == 0;
  };
  if (same("read") || same("write") || same("copy")) return;
  mine.push_back({kind, a, b, {}});
}
void range(uint32_t address, unsigned bytes) {
  if (!tracing) return;
  auto& ranges = events[thread_number()].back().ranges;
  if (!ranges.empty() && ranges.back().second == address)
    ranges.back().second += bytes;
  else
    ranges.emplace_back(address, address + bytes);
}

void end_trace(const std::vector<Fiber>& fibers) {
  if (!tracing) return;
  for (size_t i = 0; i < fibers.size(); ++i) {
    const Fiber& f = fibers[i];
    if (i % block_size.x == 0)
      texts.push_back("block " + std::to_string(f.block.x) + " " + std::to_string(f.block.y) + " " +
                      std::to_string(block_size.x) + "\n");
    std::string& text = texts.back();
    for (Event& e : events[i]) {
      text += std::to_string(f.thread.x) + " " + e.kind + " " + std::to_string(e.a) + " " + std::to_string(e.b);
      tidy(e.ranges);
      for (const auto& [from, to] : e.ranges) text += " " + std::to_string(from) + "-" + std::to_string(to);
      text += "\n";
    }
  }
}

}  // namespace simt
