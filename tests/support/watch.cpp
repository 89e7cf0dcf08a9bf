// What MLX is asked to evaluate, seen from outside: preloaded, this stands before mlx::core::eval and async_eval, walks
// the graph that is about to be evaluated, notes it, and hands the call on. (An array that is read is evaluated by the
// first of them, too.)
//
// For each kind of node (primitive, stream, dtypes) it keeps how often it was seen, the largest array, how many buffers a
// fused kernel takes, and the bytes of all that went in and out. For each edge on which one stream waits for another within one evaluation it keeps the
// primitives at both ends. It counts the evaluations that had work, and how often the main thread stopped for one: it
// evaluated and waited, or waited for (or read) an array that was evaluated asynchronously, whether that was done by then
// or not. `watch_report` writes all of it and begins anew.
//
// Compiled by tests/support/watching.py against the headers of the MLX that is installed.
#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "mlx/array.h"
#include "mlx/primitives.h"
#include "mlx/transforms.h"

using namespace mlx::core;

namespace {

struct Kind {
  long count = 0;
  size_t largest = 0;  // elements of the largest array that goes in or out
  size_t buffers = 0;
  size_t bytes = 0;
};

struct Watch {
  std::mutex mutex;
  std::map<std::string, Kind> kinds;
  std::map<std::string, long> waits;
  long worked[3] = {0, 0, 0};  // evaluations with work: blocking ones, asynchronous ones; stops of the main thread
};

Watch& watch() {
  static Watch* one = new Watch;  // never destroyed: arrays may be evaluated while the process ends
  return *one;
}

const char* name_of(const Dtype& dtype) {
  switch (dtype.val()) {
    case Dtype::Val::bool_: return "bool_";
    case Dtype::Val::uint8: return "uint8";
    case Dtype::Val::uint16: return "uint16";
    case Dtype::Val::uint32: return "uint32";
    case Dtype::Val::uint64: return "uint64";
    case Dtype::Val::int8: return "int8";
    case Dtype::Val::int16: return "int16";
    case Dtype::Val::int32: return "int32";
    case Dtype::Val::int64: return "int64";
    case Dtype::Val::float16: return "float16";
    case Dtype::Val::float32: return "float32";
    case Dtype::Val::float64: return "float64";
    case Dtype::Val::bfloat16: return "bfloat16";
    case Dtype::Val::complex64: return "complex64";
  }
  return "unknown";
}

std::string dtypes(const std::vector<array>& arrays) {
  std::string names;
  for (const auto& a : arrays) {
    if (!names.empty()) names += ",";
    names += name_of(a.dtype());
  }
  return names;
}

std::string place(const array& a) {
  return std::string(a.primitive().name()) + "@" + std::to_string(a.primitive().stream().index);
}

bool waiting(const array& a) { return a.status() == array::Status::unscheduled && a.has_primitive(); }

void note(const array& a, Watch& w) {
  const auto outputs = a.outputs();
  std::string key = std::string(a.primitive().name()) + "\t" + std::to_string(a.primitive().stream().index) + "\t" +
      dtypes(a.inputs()) + "\t" + dtypes(outputs);
  Kind& kind = w.kinds[key];
  kind.count++;
  kind.buffers = std::max(kind.buffers, a.inputs().size() + outputs.size());
  for (const auto& arrays : {a.inputs(), outputs})
    for (const auto& x : arrays) {
      kind.largest = std::max(kind.largest, x.size());
      kind.bytes += x.nbytes();
    }
  for (const auto& x : a.inputs())
    if (waiting(x) && x.primitive().stream() != a.primitive().stream()) w.waits[place(a) + "\t" + place(x)]++;
}

void walk(const std::vector<array>& asked, int how) {
  Watch& w = watch();
  std::lock_guard<std::mutex> lock(w.mutex);
  std::vector<array> open;
  std::unordered_set<std::uintptr_t> seen, primitives;
  auto visit = [&](const array& a) {
    if (waiting(a) && seen.insert(a.id()).second) open.push_back(a);
  };
  for (const auto& a : asked) visit(a);
  if (!open.empty()) w.worked[how]++;
  while (!open.empty()) {
    array a = open.back();
    open.pop_back();
    if (primitives.insert(a.primitive_id()).second) note(a, w);  // one node may have several outputs
    for (const auto& x : a.inputs()) visit(x);
    for (const auto& x : a.siblings()) visit(x);
  }
}

thread_local bool stopping = false;  // within a stop that is counted

// Whether someone who asks for `a` may have to wait. An array that another one's evaluation found done has no event.
bool pending(const array& a) {
  return waiting(a) || (a.status() == array::Status::evaluated && a.event().valid());
}

// Counts a stop of the main thread, for as long as it lasts: what it waits for within is the same one.
class Stop {
 public:
  explicit Stop(bool pending) : outermost_(pending && !stopping && getpid() == gettid()) {
    if (!outermost_) return;
    stopping = true;
    std::lock_guard<std::mutex> lock(watch().mutex);
    watch().worked[2]++;
  }
  ~Stop() {
    if (outermost_) stopping = false;
  }

 private:
  bool outermost_;
};

template <typename Function>
Function next(const char* symbol) {
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, symbol));
}

}  // namespace

extern "C" void watch_counts(long* worked) {
  std::lock_guard<std::mutex> lock(watch().mutex);
  std::copy(watch().worked, watch().worked + 3, worked);
}

extern "C" int watch_report(const char* path) {
  Watch& w = watch();
  std::lock_guard<std::mutex> lock(w.mutex);
  FILE* file = std::fopen(path, "w");
  if (!file) return 1;
  std::fprintf(file, "worked\t%ld\t%ld\t%ld\n", w.worked[0], w.worked[1], w.worked[2]);
  for (const auto& [key, kind] : w.kinds)
    std::fprintf(
        file, "kind\t%s\t%ld\t%zu\t%zu\t%zu\n", key.c_str(), kind.count, kind.largest, kind.buffers, kind.bytes);
  for (const auto& [key, count] : w.waits) std::fprintf(file, "wait\t%s\t%ld\n", key.c_str(), count);
  std::fclose(file);
  w.kinds.clear();
  w.waits.clear();
  std::fill(w.worked, w.worked + 3, 0L);
  return 0;
}

namespace mlx::core {

void eval(std::vector<array> outputs) {
  static auto real = next<void (*)(std::vector<array>)>("_ZN3mlx4core4evalESt6vectorINS0_5arrayESaIS2_EE");
  walk(outputs, 0);
  Stop stop(std::any_of(outputs.begin(), outputs.end(), pending));
  real(std::move(outputs));
}

void async_eval(std::vector<array> outputs) {
  static auto real = next<void (*)(std::vector<array>)>("_ZN3mlx4core10async_evalESt6vectorINS0_5arrayESaIS2_EE");
  walk(outputs, 1);
  real(std::move(outputs));
}

void array::wait() {
  static auto real = next<void (*)(array*)>("_ZN3mlx4core5array4waitEv");
  Stop stop(pending(*this));
  real(this);
}

}  // namespace mlx::core
