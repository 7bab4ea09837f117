// SPDX-License-Identifier: BSD-3-Clause
//
// Runs a fuzz target without libFuzzer. `replay RUNS CORPUS...` runs every file of the folders, then RUNS mutations of
// them. The same RUNS gives the same mutations. If an input fails, it is printed in hexadecimal.
#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerInitialize(int*, char***);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t*, size_t);

namespace {

using Input = std::vector<uint8_t>;

Input current;

void tell(int signal) {
  std::fputs("failing input: ", stderr);
  for (const uint8_t byte : current) std::fprintf(stderr, "%02x", byte);
  std::fputs("\n", stderr);
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void run(const Input& input) {
  current = input;
  LLVMFuzzerTestOneInput(current.data(), current.size());
}

std::vector<Input> read(int folders, char** names) {
  std::vector<Input> inputs;
  std::vector<std::filesystem::path> files;
  for (int i = 0; i < folders; ++i) {
    for (const auto& file : std::filesystem::directory_iterator(names[i])) files.push_back(file.path());
  }
  std::sort(files.begin(), files.end());
  for (const auto& path : files) {
    std::ifstream file(path, std::ios::binary);
    inputs.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return inputs;
}

Input mutate(const std::vector<Input>& inputs, std::mt19937& generator) {
  Input input = inputs[generator() % inputs.size()];
  const auto at = [&] { return generator() % (input.size() + 1); };
  for (unsigned changes = 1 + generator() % 4; changes > 0; --changes) {
    const auto byte = static_cast<uint8_t>(generator());
    switch (generator() % 4) {
      case 0: input.insert(input.begin() + static_cast<std::ptrdiff_t>(at()), byte); break;
      case 1: input.resize(at()); break;
      default:
        if (const size_t i = at(); i < input.size()) input[i] = byte;
    }
  }
  return input;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return std::fputs("usage: replay RUNS CORPUS...\n", stderr), 2;
  std::signal(SIGABRT, &tell);
  std::signal(SIGSEGV, &tell);
  LLVMFuzzerInitialize(nullptr, nullptr);
  const std::vector<Input> inputs = read(argc - 2, argv + 2);
  for (const Input& input : inputs) run(input);
  const long runs = inputs.empty() ? 0 : std::atol(argv[1]);
  std::mt19937 generator(static_cast<unsigned>(runs));
  for (long i = 0; i < runs; ++i) run(mutate(inputs, generator));
  std::printf("%zu inputs, %ld mutations of them\n", inputs.size(), runs);
}
