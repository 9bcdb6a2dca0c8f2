// Sets the chosen theme before the first paint; a classic script, because modules run after it.
(() => {
  try {
    const theme = JSON.parse(localStorage.getItem("trivium.theme"));
    if (theme === "dark" || theme === "light") document.documentElement.dataset.theme = theme;
  } catch {
    // storage is closed or damaged: the system's theme stands
  }
})();
