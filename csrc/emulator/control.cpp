// The Python module bigkern_emulator: what tests set and read. Every library the emulator is linked into carries it,
// with options and counters of its own.
#include "emulator/control.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>
#include <utility>

#include "emulator/bank_conflicts.h"
#include "emulator/counters.h"

namespace py = pybind11;

namespace bigkern::emulator {

namespace {

constexpr std::array<std::pair<const char*, Order>, 4> kOrders = {{{"forward", Order::kForward},
                                                                   {"reverse", Order::kReverse},
                                                                   {"random", Order::kRandom},
                                                                   {"priority", Order::kPriority}}};
constexpr std::array<std::pair<const char*, AsyncMode>, 3> kAsyncModes = {
    {{"issue", AsyncMode::kAtIssue}, {"wait", AsyncMode::kAtWait}, {"drawn", AsyncMode::kDrawn}}};

template <class Names>
auto by_name(const Names& names, const std::string& option, const std::string& name) {
  std::string known;
  for (const auto& [text, value] : names) {
    if (name == text) return value;
    known += (known.empty() ? "" : ", ") + std::string(text);
  }
  throw py::value_error(option + ": got '" + name + "', expected one of " + known);
}

template <class Names, class Value>
const char* name_of(const Names& names, Value value) {
  return std::find_if(names.begin(), names.end(), [&](const auto& entry) { return entry.second == value; })->first;
}

int at_least(int low, const std::string& option, const py::handle& value) {
  const int number = value.cast<int>();
  if (number < low) {
    throw py::value_error(option + ": got " + std::to_string(number) + ", expected at least " + std::to_string(low));
  }
  return number;
}

py::dict read_options() {
  const Options& o = options();
  py::dict result;
  result["order"] = name_of(kOrders, o.order);
  result["seed"] = o.seed;
  result["workers"] = o.workers;
  result["resident"] = o.resident;
  result["async_mode"] = name_of(kAsyncModes, o.async_mode);
  result["bank_conflicts"] = o.bank_conflicts;
  result["strict_exit"] = o.strict_exit;
  result["multiprocessors"] = o.multiprocessors;
  result["blocks_per_multiprocessor"] = o.blocks_per_multiprocessor;
  result["max_shared_bytes"] = o.max_shared_bytes;
  result["compute_capability"] = o.compute_capability;
  return result;
}

void set_options(const py::kwargs& chosen) {
  Options o = options();  // nothing changes when one of them is refused
  for (const auto& [key, value] : chosen) {
    const auto name = key.cast<std::string>();
    if (name == "order") {
      o.order = by_name(kOrders, name, value.cast<std::string>());
    } else if (name == "seed") {
      o.seed = value.cast<uint64_t>();
    } else if (name == "workers") {
      o.workers = at_least(0, name, value);
    } else if (name == "resident") {
      o.resident = at_least(1, name, value);
    } else if (name == "async_mode") {
      o.async_mode = by_name(kAsyncModes, name, value.cast<std::string>());
    } else if (name == "bank_conflicts") {
      o.bank_conflicts = value.cast<bool>();
    } else if (name == "strict_exit") {
      o.strict_exit = value.cast<bool>();
    } else if (name == "multiprocessors") {
      o.multiprocessors = at_least(1, name, value);
    } else if (name == "blocks_per_multiprocessor") {
      o.blocks_per_multiprocessor = at_least(1, name, value);
    } else if (name == "max_shared_bytes") {
      o.max_shared_bytes = static_cast<size_t>(at_least(0, name, value));
    } else if (name == "compute_capability") {
      o.compute_capability = at_least(0, name, value);
    } else {
      throw py::type_error("set_options: unknown option '" + name + "'");
    }
  }
  options() = o;
}

// Keyword arguments for set_options. Blocks interleave under every other seed.
py::list schedules(int seeds) {
  py::list result;
  auto add = [&](const char* order, int seed, int resident) {
    py::dict schedule;
    schedule["order"] = order;
    schedule["seed"] = seed;
    schedule["resident"] = resident;
    result.append(schedule);
  };
  add("forward", 1, 1);
  add("reverse", 1, 1);
  for (const char* order : {"random", "priority"}) {
    for (int seed = 1; seed <= seeds; seed++) add(order, seed, seed % 2 ? 1 : 3);
  }
  return result;
}

void write_bank_totals(py::dict& result, const std::string& prefix, const BankTotals& totals) {
  auto write = [&](const char* name, uint64_t value) { result[py::str(prefix + name)] = value; };
  write("accesses", totals.accesses);
  write("phases", totals.ideal);
  write("wavefronts", totals.wavefronts);
  write("conflicts", totals.wavefronts - totals.ideal);
}

py::dict read_counters() {
  const Counters& c = counters();
  py::dict result;
  result["launches"] = c.launches.load();
  result["wgmmas"] = c.wgmmas.load();
  result["tma_load_bytes"] = c.tma_load_bytes.load();
#if defined(BK_EMULATE_RACE)
  result["global_load_bytes"] = c.global_load_bytes.load();
  result["global_store_bytes"] = c.global_store_bytes.load();
  result["global_atomic_bytes"] = c.global_atomic_bytes.load();
  result["shared_load_bytes"] = c.shared_load_bytes.load();
  result["shared_store_bytes"] = c.shared_store_bytes.load();
  result["global_accesses"] = c.global_accesses.load();
  result["global_accesses_16"] = c.global_accesses_16.load();
#endif
  const BankReport banks = bank_report();
  write_bank_totals(result, "shared_load_", banks.loads);
  write_bank_totals(result, "shared_store_", banks.stores);
  py::list places;
  for (const BankPlace& worst : banks.worst) {
    py::dict place;
    place["place"] = worst.place;
    place["kind"] = worst.store ? "store" : "load";
    write_bank_totals(place, "", worst.totals);
    places.append(place);
  }
  result["bank_conflict_places"] = places;
  return result;
}

void reset_counters() {
  clear_bank_report();
  Counters& c = counters();
  c.launches = c.wgmmas = c.tma_load_bytes = 0;
  c.global_load_bytes = c.global_store_bytes = c.global_atomic_bytes = 0;
  c.shared_load_bytes = c.shared_store_bytes = 0;
  c.global_accesses = c.global_accesses_16 = 0;
}

const char* build_name() {
#if defined(BK_EMULATE_RACE)
  return "race";
#elif defined(__SANITIZE_ADDRESS__)
  return "asan";
#else
  return "plain";
#endif
}

}  // namespace

PYBIND11_MODULE(bigkern_emulator, module) {
  module.doc() = "Control of the emulated CUDA device that this library's kernels run on.";
  module.attr("build") = build_name();
  module.def("options", &read_options, "The options in force, as keyword arguments of set_options.");
  module.def("set_options", &set_options,
             "order: forward, reverse, random or priority; seed; workers: OS threads (0: one for each core); resident: "
             "blocks in flight on each; async_mode: issue, wait or drawn; bank_conflicts: count them; strict_exit; "
             "multiprocessors; "
             "blocks_per_multiprocessor; max_shared_bytes; compute_capability: 80, 90, .... Later launches use them.");
  module.def("reset_options", [] { options() = Options{}; });
  module.def("schedules", &schedules, py::arg("seeds") = 3,
             "Forward, reverse, and `seeds` random and priority schedules, as keyword arguments of set_options.");
  module.def("counters", &read_counters,
             "Launches since reset_counters, wgmmas (one a warpgroup) and tma_load_bytes (of whole boxes); in the race "
             "build also the bytes the kernels read and wrote, and how many accesses of global memory there were, of "
             "16 bytes and in all. With the option bank_conflicts, for "
             "shared_load_ and shared_store_: accesses of warps, phases (wavefronts without conflicts), wavefronts and "
             "conflicts, their difference; bank_conflict_places: the worst places, with the same numbers. The race "
             "build sees every load and store, the others ldmatrix, stmatrix and cp.async only.");
  module.def("reset_counters", &reset_counters);
  module.def("last_error", &last_error, "The message of the last launch that failed; empty when none did.");
  module.def("clear_last_error", &clear_last_error);
}

}  // namespace bigkern::emulator
